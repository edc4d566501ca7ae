"""What the parts of one translation share: the report, the era, and the data configs and systems that others refer to by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phinetune.errors import did_you_mean
from phinetune.olive.eras import Era
from phinetune.olive.reader import Report


@dataclass
class Context:
    """The state of one translation."""

    report: Report
    era: Era
    folder: Path | None
    """Folder of the user's file, where relative model folders are looked for too."""
    azure: dict[str, Any] = field(default_factory=dict)
    """The workspace that the file names once for everything: subscription_id, resource_group, workspace_name, ..."""
    azure_used: bool = False
    data_root: str | None = None
    data_root_used: bool = False
    searching: bool = False
    """The file asks for a search."""
    own_spaces: bool = True
    """With a search, settings that Olive has search values for are searched though the file does not say so."""
    data: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Name -> native data config; None for one that makes random rows."""
    trained_on: dict[str, float] = field(default_factory=dict)
    """Name of a data config that a pass trains on -> share of it that is held out."""
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    model_type: str | None = None
    """The input model's `model_type`, if its folder is on this disk."""
    metric_data: str | None = None
    """Name of the data config of metrics that name none (0.3 to 0.5: hf_config.dataset)."""

    def data_name(self, value: Any, path: str) -> str | None:
        """The data config that the reference `value` at `path` means; None, and a problem, if there is none."""
        if not isinstance(value, str):
            self.report.problem(path, f"must be the name of a data config (found: {value!r})")
            return None
        if value not in self.data:
            self.report.problem(path, f"no data config is called {value!r}{did_you_mean(value, self.data)}")
            return None
        return value

    def free_name(self, name: str, taken: dict[str, Any]) -> str:
        """`name`, with a number if it is taken."""
        count, found = 1, name
        while found in taken:
            count += 1
            found = f"{name}_{count}"
        return found
