"""Build hook: an editable install gets the same start-up line as a wheel."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``pytest_lora_argv.pth`` to editable wheels, where force-include does not reach."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; ``version`` is "standard" or "editable"."""
        if version == "editable":
            name = "pytest_lora_argv.pth"
            build_data["force_include_editable"][f"{self.root}/{name}"] = name
