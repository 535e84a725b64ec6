"""Who may import whom: the table of ARCHITECTURE.md, checked against the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("triton_backend", "exporters", "control_plane")

# What code outside triton_backend may import of it, per package; these modules need only the standard library.
SHARED = {
    "exporters": {"config", "cpu_features", "errors", "sampling_params", "version_folder"},
    "control_plane": {"protocol", "sampling_params", "errors", "version_folder"},
}
# The model that a recipe trains and the exporter exports, and what it may need.
MODELS = {"exporters": {"control_plane.training.recipes.seq2seq_transformer"}}
MODEL_LIBRARIES = {"torch", "safetensors"}
# Inside control_plane imports go from a later group to an earlier one (or stay within the same name).
RANKS = (
    {
        "databases",
        "errors",
        "extensions",
        "logs",
        "operations",
        "requests",
        "responses",
        "secrets",
        "settings",
        "version_facts",
    },
    {
        "triton",
        "triton_wire",
        "triton_fake",
        "artifacts",
        "durable_folders",
        "signatures",
        "subprocesses",
        "api_answers",
        "client",
    },
    {"auth"},
    {"jobs"},
    {"datasets", "registry"},
    {"training", "traffic", "supervision"},
    {"evaluation"},
    {"gateway", "web", "openapi", "job_kinds"},
    {"__init__"},
    {"wsgi", "worker", "reconciler"},
    {"launcher"},
    {"commands"},
    {"cli"},
)
# Inside a domain folder: views → tasks, services; tasks → services; services → tables.
DOMAIN_RANKS = {"tables": 0, "services": 1, "tasks": 2, "views": 3}
ENGINE_BOOKKEEPING = ("cache_manager", "scheduler", "sequence", "protocol", "sampling_params", "config", "errors")


def imports_of(path: Path, at_top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}


def test_the_engine_imports_nothing_of_ours():
    for path in sources("triton_backend"):
        assert {name.split(".")[0] for name in ours(path)} <= {"triton_backend"}, path


@pytest.mark.parametrize("package", sorted(SHARED))
def test_other_packages_import_only_the_engines_contract_modules(package):
    others = set(PACKAGES) - {package, "triton_backend"}
    models = MODELS.get(package, set())
    for path in sources(package):
        foreign = {name for name in ours(path) if name.split(".")[0] in others}
        assert not {name for name in foreign if not any(f"{name}.".startswith(f"{model}.") for model in models)}, path
        used = {name.split(".")[1] for name in ours(path) if name.startswith("triton_backend.")}
        assert used <= SHARED[package], f"{path} imports {sorted(used - SHARED[package])} of the engine"


@pytest.mark.parametrize("name", sorted(set().union(*MODELS.values())))
def test_a_model_that_two_packages_run_needs_nothing_of_ours(name):
    import sys

    *parents, module = name.split(".")
    names = imports_of(ROOT.joinpath(*parents, f"{module}.py"))
    assert {n.split(".")[0] for n in names} <= {*sys.stdlib_module_names, *MODEL_LIBRARIES}
    for depth in range(1, len(parents) + 1):
        package = ROOT.joinpath(*parents[:depth], "__init__.py")
        top_level = imports_of(package, at_top_level_only=True)
        assert {n.split(".")[0] for n in top_level} <= {*sys.stdlib_module_names}, package


@pytest.mark.parametrize("name", ENGINE_BOOKKEEPING)
def test_bookkeeping_and_contract_modules_need_only_the_standard_library(name):
    import sys

    names = imports_of(ROOT / "triton_backend" / f"{name}.py")
    assert {n.split(".")[0] for n in names} <= {*sys.stdlib_module_names, "triton_backend"}


def test_only_model_py_knows_tritons_python_api():
    users = [path for package in PACKAGES for path in sources(package)]
    assert [p.name for p in users if "triton_python_backend_utils" in imports_of(p)] == ["model.py"]


def rank_of(part: str) -> int:
    ranks = [rank for rank, parts in enumerate(RANKS) if part in parts]
    assert ranks, f"control_plane.{part} has no place in the import table; give it one"
    return ranks[0]


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "control_plane").parts[0].removesuffix(".py")


def test_control_plane_imports_go_from_higher_to_lower_rank():
    for path in sources("control_plane"):
        if "migrations" in path.parts:
            continue
        for name in ours(path):
            if name.startswith("control_plane."):
                target = name.split(".")[1]
                if (
                    not (ROOT / "control_plane" / target).exists()
                    and not (ROOT / f"control_plane/{target}.py").exists()
                ):
                    target = "__init__"
                is_lower = rank_of(target) < rank_of(part_of(path))
                is_same = rank_of(target) == rank_of(part_of(path)) and rank_of(target) < 2
                assert is_lower or is_same or target == part_of(path), f"{path} imports {name}"


def test_inside_a_domain_imports_go_from_views_to_tables():
    for path in sources("control_plane"):
        own = DOMAIN_RANKS.get(path.stem)
        domain = ".".join(path.relative_to(ROOT).parts[:-1])
        for name in ours(path):
            target = DOMAIN_RANKS.get(name.removeprefix(f"{domain}.").split(".")[0])
            if name.startswith(f"{domain}.") and own is not None and target is not None:
                assert target <= own, f"{path} imports {name}"


def test_heavy_libraries_stay_out_of_the_web_process():
    heavy = {"torch", "transformers", "onnxruntime", "onnx"}
    for path in sources("control_plane"):
        if "training" not in path.parts:
            assert not {name.split(".")[0] for name in imports_of(path)} & heavy, path


def test_every_module_says_what_it_owns():
    for package in PACKAGES:
        for path in sources(package):
            if path.read_text().strip() and "migrations" not in path.parts:
                assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"
