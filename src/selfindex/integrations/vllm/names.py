"""How vLLM and its users call what is here."""

from __future__ import annotations

OPTION = "selfindex"
"""Key of `--additional-config` whose value are the options of `SelfIndexConfig`."""

GROUP, NAME = "vllm.general_plugins", "selfindex"
"""Entry point of the plugin: its group and name."""

BACKEND = "selfindex.integrations.vllm.backend.PageBackend"
