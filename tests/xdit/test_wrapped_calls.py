"""Every argument of a wrapped pipeline's call is exact under `sync`, or refused by name on all ranks."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
from diffusers import StableDiffusionPipeline

from otil_xdit.comm.groups import PatchGroup
from otil_xdit.networks.compatibility import defaults_of_pipeline
from otil_xdit.runtime.callbacks import check_loop_shows
from otil_xdit.runtime.session import PatchSession
from otil_xdit.xdit.plugin.register import register
from otil_xdit.xdit.plugin.transformers import pipeline_class
from otil_xdit.xdit.plugin.wrapped_calls import WRAPPED_CALLS
from tests.support.communicators import FakeCommunicator
from tests.support.torchrun import lines_of

TOLERANCE = 5e-5
"""float32, as of the calls without these arguments (`tests/networks/test_dit_exactness.py`)."""
DIFFERENCE = 0.1
"""What xDiT's own way costs at least; the smallest seen is 0.5."""

EXACT = (
    ("sd3", "flip"),
    ("sd3", "scale"),
    ("sd3", "noise"),
    ("sd3, 7 rows", "flip"),
    ("sd3, 7 rows", "noise"),
    ("pixart-sigma", "mirror"),
    ("pixart-sigma", "noise"),
    ("hunyuandit", "flip"),
    ("hunyuandit", "noise"),
    ("sd3", "LoRA loaded afterwards"),
    ("flux", "flip"),
    ("flux", "noise"),
    ("flux", "LoRA loaded afterwards"),
    ("cogvideox", "flip"),
    ("cogvideox", "scale"),
)
BY_THE_VALUE = ("scale",)
"""What a rank can do with its part of the latent, too."""
REFUSED = {
    ("sd3", "one rank flips"): "the callback changed the latents",
    ("sd3", "guidance cut by diffusers"): "callback_on_step_end wants prompt_embeds, pooled_prompt_embeds",
    ("sd3", "guidance cut"): "a callback that changes guidance_scale",
    ("sd3", "two images without guidance"): "guidance_scale is 1",
    ("sd3", "LoRA of a layer of xDiT's"): "an adapter of the layer proj, which xDiT computes itself",
    ("pixart-sigma", "without guidance"): "guidance_scale is 1",
    ("hunyuandit", "without guidance"): "guidance_scale is 1",
    ("hunyuandit", "guidance_rescale"): "guidance_rescale",
    ("flux", "7 rows"): "height is 112, and xDiT's wrapper of FluxPipeline shares 7 rows of tokens among 2 ranks",
    ("cogvideox", "without guidance"): "guidance_scale is 1",
}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["case"], line["call"]): line for line in lines_of(2, "wrapped_calls.py")}


@pytest.mark.parametrize(
    "probe",
    [
        *EXACT,
        ("flux2", "flip"),
        ("flux2", "attention_kwargs"),
        ("flux2-klein", "without guidance"),
        ("flux2-klein", "latents"),
    ],
    ids="-".join,
)
def test_exact(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found[probe]["refused"] == [None, None]
    assert found[probe]["difference"] <= TOLERANCE


@pytest.mark.parametrize("probe", [probe for probe in EXACT if probe[1] not in BY_THE_VALUE], ids="-".join)
def test_the_comparison_can_fail(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert found[probe]["without"] > DIFFERENCE


@pytest.mark.parametrize("probe", REFUSED, ids="-".join)
def test_refused_by_name_on_all_ranks(probe: tuple[str, str], found: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert all(REFUSED[probe] in (said or "") for said in found[probe]["refused"]), found[probe]


@pytest.mark.slow
def test_exact_with_cfg_parallelism() -> None:
    lines = {(line["case"], line["call"]): line for line in lines_of(4, "wrapped_calls.py", "--cfg")}
    for probe in EXACT:
        if probe in lines:
            assert lines[probe]["difference"] is not None and lines[probe]["difference"] <= TOLERANCE, lines[probe]
    for probe, told in REFUSED.items():
        if probe in lines:
            assert all(told in (said or "") for said in lines[probe]["refused"]), lines[probe]


def test_defaults_are_those_of_diffusers() -> None:
    """xDiT's wrapper of FLUX.2 klein takes the text encoder's layers of FLUX.2 dev; no other wrapper differs."""
    register()
    from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

    wrappers = xFuserPipelineWrapperRegister._XFUSER_PIPE_MAPPING
    found = {kind.__name__: defaults_of_pipeline(one.__call__, kind.__call__) for kind, one in wrappers.items()}
    assert {name: values for name, values in found.items() if values} == {
        "Flux2KleinPipeline": {"text_encoder_out_layers": (9, 18, 27)},
        "LattePipeline": {"decode_chunk_size": 14},  # refused
    }


def test_a_default_that_differs_is_given_to_the_wrapper() -> None:
    class Inner:
        def __call__(self, prompt: str, layers: tuple[int, ...] = (9,)) -> tuple[int, ...]:
            return layers

    class Wrapper:
        def __init__(self) -> None:
            self.module = Inner()

        def __call__(self, prompt: str, layers: tuple[int, ...] = (10,)) -> tuple[int, ...]:
            return layers

    session = PatchSession(FakeCommunicator(1), PatchGroup(cast(Any, None), 0, 1))
    wrapper = Wrapper()
    session.attach(wrapper)
    assert wrapper("x") == (9,) and wrapper("x", (3,)) == (3,) and wrapper("x", layers=(4,)) == (4,)


@pytest.mark.parametrize(
    ("scale", "distilled", "refused"), [(3.0, False, True), (3.0, True, False), (1.0, False, False)]
)
def test_guidance_of_an_undistilled_klein_is_refused(scale: float, distilled: bool, refused: bool) -> None:
    pipe = SimpleNamespace(
        module=object(),
        config=SimpleNamespace(is_distilled=distilled),
        engine_config=SimpleNamespace(parallel_config=SimpleNamespace(sp_degree=1)),
        vae_scale_factor=8,
        default_sample_size=128,
    )
    with pytest.raises(ValueError, match="pass without the prompt") if refused else nullcontext():
        WRAPPED_CALLS["xFuserFlux2KleinPipeline"].check(pipe, {"guidance_scale": scale})


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="comprehensions have no locals of their own there")
@pytest.mark.parametrize("name", ["pipeline_cosmos3_omni", "pipeline_ideogram4"])
def test_a_loop_that_cannot_find_what_a_callback_wants_refuses_it(name: str) -> None:
    register()
    classes = {
        "pipeline_cosmos3_omni": "get_cosmos3_pipeline_class",
        "pipeline_ideogram4": "get_ideogram4_pipeline_class",
    }
    kind = pipeline_class((name, classes[name]))
    wanted = {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents"]}
    with pytest.raises(ValueError, match="callback_on_step_end wants latents, which .* cannot find before Python 3.12"):
        check_loop_shows(kind, wanted)
    for allowed in ({**wanted, "callback_on_step_end_tensor_inputs": []}, {**wanted, "callback_on_step_end": None}):
        check_loop_shows(kind, allowed)
    check_loop_shows(StableDiffusionPipeline, wanted)
