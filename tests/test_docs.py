"""What README.md and ARCHITECTURE.md say is what is there: settings, files, commands, routes, parameters, metrics."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from control_plane.settings import Settings
from control_plane.traffic import prometheus
from triton_backend.metrics import METRICS
from triton_backend.protocol import INPUTS, OUTPUTS
from triton_backend.sampling_params import FIELDS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def table_after(heading: str, text: str = README) -> list[list[str]]:
    """Cells of the first table below a heading, without its two head lines."""
    section = text.split(f"\n{heading}\n", 1)[1]
    lines = [line for line in section.split("\n## ", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_setting_stands_in_the_table_with_its_default_and_reason():
    documented = {row[0]: (row[1], row[2]) for row in table_after("## Settings")}
    shown = {
        setting.metadata["variable"]: (
            setting.metadata["default"].replace(str(ROOT) + "/", ""),
            setting.metadata["why"],
        )
        for setting in fields(Settings)
    }
    assert documented == shown


def test_the_file_tree_is_the_real_one():
    tree = README.split("\n## Files\n", 1)[1].split("```")[1]
    documented, folder = set(), ""
    for line in tree.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            if not folder:
                documented.add(name)
        else:
            documented.add(folder + name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = {
        path
        for path in tracked
        if path.endswith(".py")
        and not path.startswith(("tests/", "control_plane/migrations/versions/"))
        and not path.endswith("__init__.py")
    }
    assert {path for path in documented if path.endswith(".py")} == sources
    assert all((ROOT / path).exists() for path in documented)


def test_every_command_is_shown():
    from typer.main import get_command

    from control_plane.cli import app

    def commands(command, prefix):
        for name, child in getattr(command, "commands", {}).items():
            yield from commands(child, f"{prefix} {name}") if getattr(child, "commands", None) else [f"{prefix} {name}"]

    assert [name for name in commands(get_command(app), "llmos") if name not in README] == []


def test_every_route_is_shown(tmp_path):
    from control_plane import create_app

    app = create_app(Settings.from_environment({"LLMOS_HOME": str(tmp_path)}))
    routes = {re.sub(r"<(?:\w+:)?(\w+)>", r"<\1>", rule.rule) for rule in app.url_map.iter_rules()}
    assert sorted(route for route in routes if f"`{route}`" not in README) == []


def test_every_kind_of_job_is_shown_with_its_role():
    from control_plane.job_kinds import KINDS

    assert {row[0]: row[2] for row in table_after("## Jobs")} == {name: kind.role for name, kind in KINDS.items()}


@pytest.mark.parametrize("specs", [INPUTS, OUTPUTS], ids=["inputs", "outputs"])
def test_every_tensor_is_shown(specs):
    assert [spec.name for spec in specs if f"`{spec.name}`" not in README] == []


def test_every_sampling_parameter_and_metric_is_shown():
    assert [name for name in FIELDS if f"`{name}`" not in README] == []
    assert [spec.name for spec in METRICS if f"`{spec.name}`" not in README] == []
    assert [name for name in prometheus.METRICS if f"`{name}`" not in README] == []


def test_the_import_table_names_the_contract_modules():
    from tests.test_architecture import SHARED

    for package, modules in SHARED.items():
        row = next(line for line in ARCHITECTURE.splitlines() if line.startswith(f"| `{package}` |"))
        assert all(module in row for module in modules)
