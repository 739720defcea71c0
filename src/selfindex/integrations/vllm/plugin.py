"""What vLLM calls when it loads plugins: registers the backend, acts on the option `selfindex` alone.

Imports nothing of vLLM, PyTorch or the cache until then: every process of every vLLM of this installation
comes through here.
"""

from __future__ import annotations

import os
from functools import wraps
from importlib.metadata import entry_points
from typing import Any

from .names import BACKEND, GROUP, NAME, OPTION


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; may be called more than once in a process."""
    from ...versions import vllm_problem, vllm_version

    if vllm_problem(vllm_version()) is not None:
        _watch_config(only_refuse=True)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Whoever registered a backend of their own by this name keeps it.
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    _watch_config(only_refuse=False)


def state() -> tuple[bool, str]:
    """Whether vLLM will load the plugin, and with which version or why not; imports nothing of vLLM."""
    from ...versions import vllm_problem, vllm_version

    version = vllm_version()
    problem = vllm_problem(version)
    if problem is not None:
        return False, problem
    if not any(entry.name == NAME for entry in entry_points(group=GROUP)):
        return False, f"vLLM {version} does not see the plugin: install selfindex again, as a package"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return False, f"VLLM_PLUGINS={allowed} keeps vLLM {version} from loading the plugin: add {NAME}"
    return True, f"{version} loads the plugin"


def _watch_config(only_refuse: bool) -> None:
    """Check the options of an engine that asks for the cache, before anything of it is built.

    The platform is where vLLM itself completes and refuses configurations; it has no hook for plugins.
    """
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if getattr(platform, "_selfindex", False):
        return
    check = platform.check_and_update_config.__func__

    @wraps(check)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        asked = OPTION in (vllm_config.additional_config or {})
        if asked and vllm_config.model_config is not None:
            from . import options

            options.check(vllm_config)
        check(cls, vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform._selfindex = True
    if only_refuse or not current_platform.is_cpu():
        return
    choose = platform.get_attn_backend_cls.__func__

    @wraps(choose)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        """The CPU's platform knows one backend and no choice: make it keep ours where it was chosen."""
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend is AttentionBackendEnum.CUSTOM and selected_backend.get_path() == BACKEND:
            return BACKEND
        chosen: str = choose(cls, selected_backend, *args, **kwargs)
        return chosen

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
