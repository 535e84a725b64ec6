"""What a person sees at the end of an export, a plan or a verification: one table each, from the child's last event.

Rows whose figures are missing are left out: an encoder has no greedy tokens, an uncertified version no certificate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

Fields = Mapping[str, Any]
Row = tuple[str, str | Text]


def export_table(finished: Fields) -> Table:
    """The ``finished`` event of ``python -m exporters``."""
    summary, graph = finished.get("certificate") or {}, finished.get("graph") or {}
    rows: list[Row] = [("certificate", _verdict(finished.get("passed"), summary.get("failed", ())))]
    rows += _proof_rows(summary)
    if finished.get("size_bytes"):
        rows.append(("size", f"{size(finished['size_bytes'])}{_in_precision(summary)}"))
    if {"traced", "fused"} <= set(graph):
        before, after = graph["traced"], graph["fused"]
        rows.append(
            (
                "graph",
                f"{before['num_nodes_per_layer']} → {after['num_nodes_per_layer']} nodes a layer, "
                f"{before['num_nodes']:,} → {after['num_nodes']:,} in all",
            )
        )
    timings = {name: used["seconds"] for name, used in (finished.get("timings") or {}).items()}
    if timings:
        steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in timings.items() if seconds >= 0.1)
        rows.append(("time", f"{sum(timings.values()):.1f} s: {steps}"))
    rows.append(("folder", str(finished.get("folder", ""))))
    rows.append(("digest", str(finished.get("digest", ""))))
    return _table(rows)


def plan_table(plan: Fields) -> Table:
    """What ``--dry-run`` found out: ``exporters.dry_run.Plan``."""
    lengths = f"{plan['max_model_len']:,} tokens"
    if plan["max_source_len"]:
        lengths += f", sources of {plan['max_source_len']:,}"
    rows: list[Row] = [
        ("model", f"{plan['name']}: {plan['architecture']}, {plan['kind'].replace('_', '–')}"),
        ("parameters", f"{plan['num_parameters']:,} in {plan['num_layers']} layers"),
        ("precision", f"{plan['precision']} on {plan['device']}"),
        ("folder", f"about {size(plan['folder_bytes'])}"),
        ("context", lengths),
        (
            "cache",
            f"{size(plan['cache_bytes_per_row'])} a row, {size(plan['cache_bytes'])} for {plan['max_num_seqs']} "
            "sequences",
        ),
        ("memory", f"about {size(plan['export_peak_bytes'])} to export, {size(plan['serving_bytes'])} to serve"),
        (
            "speed",
            f"a decode step takes at least {1000 * plan['decode_step_s']:.1f} ms: it reads "
            f"{size(plan['bytes_per_decode_step'])}, memory delivers {plan['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
        ),
    ]
    if plan["lora_bytes"]:
        rows.insert(6, ("adapters", f"{size(plan['lora_bytes'])} for all slots"))
    if plan["ignored_settings"]:
        asked = ", ".join(f"{name} {value}" for name, value in plan["ignored_settings"].items())
        rows.append(("not by itself", f"the checkpoint asks generate for {asked}: ask for it in requests, if at all"))
    return _table(rows)


def verification_table(finished: Fields) -> Table:
    """The ``finished`` event of ``python -m exporters.verify``."""
    recorded, found = finished.get("recorded") or {}, finished.get("found") or {}
    rows: list[Row] = [("result", _verdict(finished["passed"], found.get("failed", ())))]
    rows.append(("original", finished.get("original") or f"not compared: {finished.get('reason')}"))
    repeated = finished.get("repetition")
    if repeated:
        text = f"{repeated['num_equal']} of {repeated['num_prompts']} prompts give the recorded tokens"
        text += f", {repeated['num_ties']} ties, {repeated['num_mismatches']} mismatches"
        rows.append(("recorded tokens", text))
        if repeated["max_logit_difference"] is not None:
            rows.append(("recorded logits", f"max difference {repeated['max_logit_difference']:.2g}"))
    then, now = dict(_proof_rows(recorded)), dict(_proof_rows(found))
    rows += [(f"{name}, recorded", value) for name, value in then.items()]
    rows += [(f"{name}, now", value) for name, value in now.items()]
    rows.append(("digest", str(finished["digest"])))
    return _table(rows)


def size(num_bytes: float) -> str:
    """``1.2 GiB``, ``538 MiB``, ``12 KiB``."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            number = num_bytes / factor
            return f"{number:.1f} {unit}" if number < 10 else f"{number:,.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _proof_rows(summary: Fields) -> list[Row]:
    rows: list[Row] = []
    if summary.get("num_prompts") is not None:
        counts = f"{summary['num_equal']} of {summary['num_prompts']} equal, {summary['num_ties']} ties, "
        counts += f"{summary['num_mismatches']} mismatches ({summary['num_tokens_compared']:,} tokens)"
        rows.append(("prompts", counts))
    if summary.get("agreement") is not None:
        agreement = f"{summary['agreement']:.2%} of greedy tokens"
        if summary.get("text_agreement") is not None:
            agreement += f", {summary['text_agreement']:.2%} on text"
        rows.append(("agreement", agreement))
    if summary.get("max_logit_difference") is not None:
        mean = summary.get("mean_logit_difference")
        text = f"max difference {summary['max_logit_difference']:.2g}"
        rows.append(("logits", text + (f", mean {mean:.2g}" if mean is not None else "")))
    if summary.get("kl_mean") is not None and summary.get("perplexity_ratio") is not None:
        ratio, before = summary["perplexity_ratio"], summary["perplexity_original"]
        divergence = f"KL {summary['kl_mean']:.2g} mean, {summary['kl_p99']:.2g} at the 99th percentile (nats)"
        rows.append(("text", f"{divergence}; perplexity {before:.2f} × {ratio:.4f}"))
    if summary.get("min_cosine") is not None:
        text = f"{summary['num_texts']} texts, cosine at least {summary['min_cosine']:.6f}"
        rows.append(("embeddings", f"{text}, max difference {summary['max_difference']:.2g}"))
    if summary.get("decode_tokens_per_s") is not None:
        prefill = summary.get("prefill_tokens_per_s")
        text = f"{prefill:,.0f} tokens/s prefill, " if prefill is not None else ""
        rows.append(("speed", f"{text}{summary['decode_tokens_per_s']:,.1f} tokens/s decode (one request)"))
    if summary.get("tokens_per_s") is not None:
        rows.append(("speed", f"{summary['tokens_per_s']:,.0f} tokens/s"))
    if summary.get("peak_rss_bytes"):
        text = f"{size(summary['peak_rss_bytes'])} peak of the engine"
        if summary.get("export_peak_rss_bytes"):
            text += f", {size(summary['export_peak_rss_bytes'])} of this run"
        rows.append(("memory", text))
    return rows


def _verdict(passed: bool | None, failed: Sequence[str]) -> Text:
    if passed is None:
        return Text("none was made", style="yellow")
    if passed:
        return Text("passed", style="bold green")
    return Text(f"FAILED{': ' if failed else ''}{', '.join(failed)}", style="bold red")


def _in_precision(summary: Fields) -> str:
    return f" in {summary['precision']}" if summary.get("precision") else ""


def _table(rows: Sequence[Row]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    return table
