"""`register()`: hooks the plugin into xfuser, once.

| what in xfuser 0.7.0 | what it does besides | hooked in |
|---|---|---|
| `xFuserArgs.add_runner_args`, `.add_cli_args` (config/args.py) | know the "Otil options" | `args` |
| `xFuserArgs.__init__` (same file) | takes them by name | `args` |
| `xFuserArgs.from_runner_args`, `.from_cli_args` (same file) | validate them; patches take the ring slot | `args` |
| `xFuserArgs.create_config` (same file) | the choice travels with the parallel config | `args` |
| `runtime_state.initialize_runtime_state` (core/distributed) | connects the strategy to the pipeline | `sessions` |
| `RuntimeState`'s check of attention backends (same folder) | no ring limits | `backends` |
| `DiTRuntimeState._calc_patches_metadata` and its two kin (same folder) | any height | `rows` |
| `xFuserPipelineBaseWrapper._init_sync_pipeline` and its kin (model_executor/pipelines) | fill rows up | `rows` |
| `xFuserPatchEmbedWrapper.forward` and its kin (model_executor/layers/embeddings.py) | have positions there | `rows` |
| `RuntimeState._select_attention_backend` (same folder) | SDPA unless another is named | `backends` |
| `xFuserPipelineBaseWrapper.__init__` (model_executor/pipelines) | its calls are generations | `sessions` |
| `usp.ring_attn` (model_executor/layers/usp.py) | gathers over the patches while a generation runs | `attention` |
| `usp._get_attention_function` (same file) | its backends leave out keys that are padding | `attention` |
| `usp._trim_trailing_kv_padding` (same file) | says which keys are padding where there is one patch | `attention` |
| `xFuserModel._validate_config` (runner_models/base_model.py) | no ring limits | `sessions` |
| `xFuserModel`'s last step of loading (same file) | a second pipeline's calls are generations | `sessions` |
| `GroupCoordinator.all_gather` (core/distributed) | shows predictions, cuts filling off | `attention` |
| `xFuserFlowMatchEulerDiscreteSchedulerWrapper.step` (model_executor) | sigmas on the CPU | `schedulers` |

Without ``--parallel`` none of them changes anything. What is wrong in xfuser itself is put right in
`otil_xdit.xdit.plugin.shims`.
"""

from __future__ import annotations

from otil_xdit.xdit.cpu import enable_cpu_ranks
from otil_xdit.xdit.plugin.args import hook_args
from otil_xdit.xdit.plugin.attention import hook_attention, hook_gathered
from otil_xdit.xdit.plugin.schedulers import hook_flow_match
from otil_xdit.xdit.plugin.sessions import hook_models, hook_pipelines, hook_runtime_state
from otil_xdit.xdit.plugin.shims import install_shims
from otil_xdit.xdit.versions import warn_if_untested

_MARK = "_otil_xdit_registered"


def register() -> None:
    """Teach xfuser the parallel strategies; calling it again changes nothing.

    Where there is no accelerator, xfuser is made to run on gloo first (`otil_xdit.xdit.cpu`).
    """
    enable_cpu_ranks()
    import xfuser

    if getattr(xfuser, _MARK, False):
        return
    warn_if_untested()
    hook_args(xfuser.xFuserArgs)
    hook_runtime_state()
    hook_pipelines()
    hook_attention()
    hook_gathered()
    hook_models()
    install_shims()
    hook_flow_match()
    from otil_xdit.xdit.models.tiny_dit import register_models

    register_models()
    setattr(xfuser, _MARK, True)
