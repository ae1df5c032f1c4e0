"""`llmctl presets`: the table of model presets on stdout, without loading torch."""

import re
from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, result, result_json, table

app = command_app()

COLUMNS = ("name", "family", "parameters", "layers", "width", "heads", "source")
RIGHT = frozenset({"parameters", "layers", "width", "heads"})


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per preset.")] = False,
) -> None:
    """List the model presets with sizes and sources.

    Examples:

      llmctl presets

      llmctl presets --json | head -3
    """
    from llmctl.model.presets import PRESETS

    rows = [describe(name) for name in PRESETS]
    if as_json:
        for row in rows:
            result_json(row)
        return
    for line in table(COLUMNS, [table_row(row) for row in rows], right=RIGHT):
        result(line)


def describe(name: str) -> dict[str, Any]:
    """Return one preset as a flat record; presets of any family are counted as decoders."""
    from llmctl.model.parameters import count_parameters
    from llmctl.model.presets import get_preset, preset_config
    from llmctl.model.shapes import complete

    preset = get_preset(name)
    config = complete(preset_config(name))
    parameters = count_parameters(config)
    return {
        "name": name,
        "summary": preset.summary,
        "family": "any" if preset.dims_only else config.family,
        "parameters": parameters.total,
        "non_embedding": parameters.non_embedding,
        "published_parameters": preset.n_parameters,
        "published_tokens": preset.tokens or None,
        "layers": config.n_layers + config.n_decoder_layers + config.query_layer,
        "width": config.d_model,
        "heads": config.n_heads,
        "feed_forward": config.d_ff,
        "context": config.max_positions,
        "vocabulary": config.vocab_size,
        "source": preset.source,
    }


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Shorten long values so that the table fits in 80 columns."""
    family = str(row["family"]).replace("encoder_decoder", "enc-dec")
    return {**row, "family": family, "parameters": short(row["parameters"]), "source": short_source(row["source"])}


def short_source(source: str) -> str:
    """Return the first arXiv id of a source, or its text up to the first comma."""
    arxiv_id = re.search(r"arXiv:\d+\.\d+", source)
    return arxiv_id.group() if arxiv_id else source.split(",", maxsplit=1)[0]


def short(n_parameters: int) -> str:
    """Return a count in three significant digits: 1.02M, 124M, 175B."""
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("K", 1000)):
        if n_parameters >= size:
            value = n_parameters / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return str(n_parameters)
