"""The README.md of a model's folder: what the model is, what it was trained on, where it came from."""

import json
from collections.abc import Mapping
from typing import Any

from scarcade.models.model import AtlasModel


def model_card(model: AtlasModel, record: Mapping[str, Any]) -> str:
    """Markdown; `record` is the content of its ``model.json``."""
    schema = model.schema
    lines = [
        "---",
        "library_name: scarcade",
        "tags: [biology, genomics, single-cell]",
        "---",
        f"# A {model.name} model of {schema.n_genes:,} genes and {len(schema.batch):,} batches",
        "",
        f"Trained with scarcade {record['scarcade_version']}. Map new cells onto it with `scarcade map`.",
        "",
        f"- batches: `{schema.batch.name}` ({len(schema.batch):,} values)",
    ]
    for labels in schema.labels:
        lines.append(f"- labels: `{labels.name}` ({len(labels):,} values)")
    if schema.categorical or schema.continuous:
        lines.append(f"- covariates: {', '.join([c.name for c in schema.categorical] + list(schema.continuous))}")
    if model.surgery_notice:
        lines += ["", f"Note: {model.surgery_notice}."]
    if record["lineage"]:
        lines += ["", "## Lineage", "", "| reference | data | updated by | new |", "|---|---|---|---|"]
        for one in record["lineage"]:
            new = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in one["new"].items())
            data = str(one["data_fingerprint"] or "unknown")
            lines.append(f"| `{str(one['fingerprint'])[:16]}` | `{data[:16]}` | {one['update']} | {new or 'nothing'} |")
    for title, values in (("Architecture", record["config"]), ("Training", record["training"])):
        lines += ["", f"## {title}", "", "```json", json.dumps(values, indent=1), "```"]
    return "\n".join(lines) + "\n"
