"""What llmos tells a person about an installation: addresses, tables of processes and models, examples to copy."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from rich.table import Table

from control_plane.registry.serving_state import LOADED, ServingState
from control_plane.settings import Settings
from control_plane.supervision import ProcessStatus

PROMPT = "The import statement"
_COLOURS = {"RUNNING": "green", "Loaded": "green", "STARTING": "yellow", "Loading": "yellow", "Pending": "yellow"}


def urls(settings: Settings) -> dict[str, str]:
    return {
        "web": f"{settings.web_url}/",
        "OpenAI API": f"{settings.web_url}/v1",
        "Triton HTTP": f"http://{settings.triton_http_url}",
        "Triton gRPC": settings.triton_grpc_url,
        "Triton metrics": f"http://127.0.0.1:{settings.triton_metrics_port}/metrics",
    }


def url_lines(settings: Settings) -> list[str]:
    return [f"  {name:<15} {url}" for name, url in urls(settings).items()]


def example_lines(settings: Settings, model: str, key: str | None) -> list[str]:
    """A curl command and an OpenAI client, both ready to be copied."""
    body = {"text_input": PROMPT, "max_tokens": 32, "temperature": 0, "exclude_input_in_output": True}
    shown_key = key or "llmos_…"
    return [
        f"curl -s localhost:{settings.triton_http_port}/v2/models/{model}/generate \\",
        f"  -H 'Content-Type: application/json' -d '{json.dumps(body, separators=(',', ':'))}'",
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{settings.web_url}/v1", api_key="{shown_key}")',
        f'print(client.completions.create(model="{model}", prompt="{PROMPT}", max_tokens=32).choices[0].text)',
    ]


def process_table(processes: list[ProcessStatus]) -> Table:
    table = Table("process", "state", "pid", "for", box=None, pad_edge=False)
    for process in processes:
        uptime = _duration(time.time() - process.started_at) if process.is_running else "–"
        table.add_row(process.name, _coloured(process.state), str(process.pid or "–"), uptime)
    return table


def model_table(serving: ServingState) -> Table:
    table = Table("model", "version", "state", "for", "why", box=None, pad_edge=False)
    for name, model in serving.models.items():
        why = "" if model.state == LOADED else ": ".join(filter(None, (model.reason, model.message)))
        age = _duration(time.time() - model.since)
        table.add_row(name, str(model.version), _coloured(model.state), age, why.replace("[", r"\["))
    return table


def is_all_well(processes: list[ProcessStatus], serving: ServingState) -> bool:
    """Whether every process runs and every installed model is loaded."""
    return (
        bool(processes)
        and all(process.is_running for process in processes)
        and serving.is_current
        and serving.triton_is_reachable
        and all(model.state == LOADED for model in serving.models.values())
    )


def status_document(settings: Settings, processes: list[ProcessStatus], serving: ServingState) -> Mapping[str, object]:
    """The same as the tables, for programs."""
    return {
        "is_all_well": is_all_well(processes, serving),
        "urls": urls(settings),
        "processes": {process.name: {"state": process.state, "pid": process.pid} for process in processes},
        "models": {
            name: {"version": m.version, "state": m.state, "reason": m.reason, "message": m.message}
            for name, m in serving.models.items()
        },
    }


def _coloured(state: str) -> str:
    colour = _COLOURS.get(state, "red")
    return f"[{colour}]{state}[/{colour}]"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
