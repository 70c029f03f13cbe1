"""The catalog: every model's record, by name. What the rest of the package knows of a model comes from here."""

from __future__ import annotations

from otil_xdit.catalog.architectures import ARCHITECTURES, Architecture
from otil_xdit.catalog.dits import DITS, DitRecord
from otil_xdit.catalog.record import ModelRecord
from otil_xdit.catalog.unets import UNETS, UnetRecord, read_unet_folder

MODELS: dict[str, ModelRecord] = {record.label: record for record in (*UNETS, *DITS)}
"""By the first of each model's names."""


def register_model(record: ModelRecord) -> ModelRecord:
    """Add a model to the catalog, before `otil_xdit.register` is called.

    Raises:
        ValueError: where another record has one of its names.
    """
    for name in record.names:
        known = find_record(name)
        if known is not None and known != record:
            raise ValueError(f"{name!r} is in the catalog already, as one of {', '.join(known.names)}")
    MODELS[record.label] = record
    return record


def find_record(model: str | None) -> ModelRecord | None:
    """Return the record of a value of ``--model``; None for a model of which nothing is known.

    Raises:
        FlagError: for a folder of a text-to-image U-Net whose files are not there or not understood.
    """
    if not model:
        return None
    known = next((record for record in MODELS.values() if record.is_named(model)), None)
    return known if known is not None else read_unet_folder(model)


def find_unet(model: str | None) -> UnetRecord | None:
    """Return the record of a U-Net; None for any other model. Raises as `find_record`."""
    record = find_record(model)
    return record if isinstance(record, UnetRecord) else None


def find_dit(model: str | None) -> DitRecord | None:
    """Return the record of a transformer whose geometry is known; None for any other model."""
    record = find_record(model)
    return record if isinstance(record, DitRecord) and record.vae else None


def architectures() -> dict[str, Architecture]:
    """Return how xDiT cuts transformers, by the class of the network: `ARCHITECTURES`, and what records bring."""
    dits = [record for record in MODELS.values() if isinstance(record, DitRecord)]
    return {**ARCHITECTURES, **{record.kind: record.architecture for record in dits if record.architecture}}


def unet_records() -> list[UnetRecord]:
    """Return the records of all U-Nets known by name."""
    return [record for record in MODELS.values() if isinstance(record, UnetRecord)]


def published_networks() -> dict[str, ModelRecord]:
    """Return the models whose networks can be built without weights, by the label that tools know them by."""
    return {record.network.label: record for record in MODELS.values() if record.network is not None}
