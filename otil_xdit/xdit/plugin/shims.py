"""What is wrong in xfuser 0.7.0 itself, and is put right here until it is mended there.

| where | what is wrong | here |
|---|---|---|
| layers/attention_processor.py:464 | SD3.5-medium: `joint_strategy` is unbound in the attention without text | `sd3` |
| models/transformers/transformer_flux.py:376 | Flux: calls a method by a name that it does not have | `flux` |
| models/transformers/transformer_flux2.py:515 | Flux.2: text that the ranks do not divide is cut unevenly | `flux2` |
| models/transformers/transformer_z_image.py:212 | Z-Image: lacks an argument that diffusers 0.42 gives | `z_image` |
| models/transformers/transformer_qwen.py:225 | Qwen-Image-Edit-2511: which tokens are noisy is not cut | `qwen` |
| models/transformers/transformer_hunyuan_video.py:242 | HunyuanVideo: tokens are cut unevenly | `hunyuan_video` |
| models/transformers/transformer_cosmos3.py:171 | Cosmos 3: lacks an argument that diffusers 0.42 gives | `cosmos3` |
| pipelines/pipeline_consisid.py:352 | ConsisID: its scheduler's noise does not come from the generator | `consisid` |
| cache/adapters/flux2.py:157 | FLUX.2's FBCache compares a step with itself | `flux2_cache` |
| models/transformers/transformer_lumina2.py:150 | Lumina2: refuses a ring, which needs other masks | `lumina2` |

(Paths below xfuser/model_executor; the last column is in `otil_xdit.xdit.plugin.mends`.) A shim does nothing where the
line that it is for has gone;
tests/xdit/test_shims.py fails then, and the shim is to be removed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from otil_xdit.xdit.plugin import mends

_TRANSFORMERS = "xfuser.model_executor.models.transformers"


@dataclass(frozen=True)
class Shim:
    """A mistake of xfuser's and what puts it right.

    Attributes:
        module, owner: where it is, and the class in there.
        method: its method.
        line: what stands in that method as long as it is wrong.
        times: how often, where that tells.
        mend: gets the class, and replaces methods of it.
    """

    module: str
    owner: str
    method: str
    line: str
    mend: Callable[[Any], None]
    times: int | None = None

    def find(self) -> Any:
        """Return the class; None where xfuser cannot import it with what is installed."""
        try:
            found: Any = getattr(importlib.import_module(self.module), self.owner)
            return found if isinstance(found, type) else found()  # some are made when they are wanted
        except ImportError:
            return None

    def is_needed(self) -> bool:
        """Return whether xfuser still has the mistake."""
        owner = self.find()
        if owner is None:
            return False
        found = inspect.getsource(inspect.unwrap(getattr(owner, self.method))).count(self.line)
        return found > 0 if self.times is None else found == self.times


def install_shims() -> None:
    """Put right what is still wrong."""
    for shim in SHIMS:
        if shim.is_needed():
            shim.mend(shim.find())


SHIMS = (
    Shim(
        "xfuser.model_executor.layers.attention_processor",
        "xFuserJointAttnProcessor2_0",
        "__call__",
        "joint_strategy = None\n                else:",
        mends.sd3,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_flux",
        "xFuserFlux1Transformer2DWrapper",
        "forward",
        "self._pad_to_sp_divisible(hidden_states",
        mends.flux,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_flux2",
        "xFuserFlux2Transformer2DWrapper",
        "forward",
        "self._pad_to_sp_divisible(",
        mends.flux2,
        times=2,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_z_image",
        "xFuserZImageTransformer2DWrapper",
        "forward",
        "f_patch_size=1,\n        return_dict",
        mends.z_image,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_qwen",
        "xFuserQwenImageTransformerWrapper",
        "forward",
        "# Construct joint attention mask once to avoid",  # where a mended one has cut modulate_index before
        mends.qwen,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_hunyuan_video",
        "xFuserHunyuanVideoTransformer3DWrapper",
        "forward",
        "hidden_states = torch.chunk(hidden_states,\n                                    get_sequence_parallel_world",
        mends.hunyuan_video,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_cosmos3",
        "get_cosmos3_transformer_wrapper_class",
        "forward",
        "action_domain_ids=None,\n        ):",
        mends.cosmos3,
    ),
    Shim(
        "xfuser.model_executor.pipelines.pipeline_consisid",
        "xFuserConsisIDPipeline",
        "__call__",
        "self.prepare_extra_step_kwargs(generator, eta)",
        mends.consisid,
    ),
    Shim(
        f"{_TRANSFORMERS}.transformer_lumina2",
        "xFuserLumina2Transformer2DWrapper",
        "__init__",
        "if get_ring_parallel_world_size() > 1:",
        mends.lumina2,
    ),
    Shim(
        "xfuser.model_executor.cache.adapters.flux2",
        "Flux2FBCachedTransformerBlocks",
        "get_modulated_inputs",
        "prev_first_hidden_states_residual = self.cache_context.modulated_inputs\n\n",
        mends.flux2_cache,
    ),
)
