"""``llmos system``: what a running installation is made of, and how full it is."""

from __future__ import annotations

from typing import Any

import typer

from control_plane.commands.api import AsJson, connected, print_json, print_table


def system(as_json: AsJson = False) -> None:
    """Processes, workers, Triton's models, stores, disks and memory; exit code 1 if a part does not answer."""
    with connected() as llmos:
        found = llmos.system()
    parts = {name: part for name, part in found.items() if isinstance(part, dict) and "error" in part}
    if as_json:
        print_json(found)
    else:
        rows = [[name, part["error"] or _said(name, part)] for name, part in parts.items()]
        rows += [[disk["name"], f"{_gib(disk, 'free_bytes')} free in {disk['path']}"] for disk in found["disks"]]
        memory = found["memory"]
        rows.append(["memory", f"{_gib(memory, 'available_bytes')} available, {memory['num_cpus']} CPUs"])
        print_table(["part", ""], rows)
    if any(part["error"] for part in parts.values()):
        raise typer.Exit(1)


def _said(name: str, part: dict[str, Any]) -> str:
    if name == "supervisor":
        return ", ".join(f"{process['name']} {process['state']}" for process in part["processes"])
    if name == "workers":
        return ", ".join(f"{each['name']}: {' '.join(each['queues'])}" for each in part["workers"]) or "none answers"
    if name == "triton":
        loaded = [f"{model['name']}/{model['version']}" for model in part["models"] if model["state"] == "READY"]
        return f"version {part['version']}, ready: {', '.join(loaded) or 'none'}"
    return " ".join(filter(None, (part.get("kind"), part["version"])))


def _gib(part: dict[str, Any], name: str) -> str:
    return f"{part[name] / (1 << 30):.1f} of {part['total_bytes'] / (1 << 30):.1f} GiB"
