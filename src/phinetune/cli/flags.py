"""The options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Model folder, hub id (owner/name) or embedded model (smollm2-135m).", show_default=False
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="Data file (.jsonl .json .csv .tsv .parquet) or bundled set (tone).", show_default=False
    ),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Output folder.", show_default=False)]
Prompt = Annotated[
    str | None,
    typer.Option(
        help='Column template of the question, such as "What is the tone of this phrase? {phrase}".', show_default=False
    ),
]
Completion = Annotated[
    str | None, typer.Option(help='Column template of the answer, such as "{tone}".', show_default=False)
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML or JSON file with the same keys; options and --set win over it.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="key=value for any key, such as peft_config.r=8 or training_config.learning_rate=2e-4.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool | None,
    typer.Option("--overwrite", help="Replace what the output folder holds of an earlier run.", show_default=False),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show warnings, errors and results only.", show_default=False)
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", help="Another place of the adapter's base model (same content).", show_default=False),
]
Split = Annotated[
    str | None,
    typer.Option(help="Which examples: test (held out), train or all (default: test).", show_default=False),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest answer, in tokens (default: half as much again as the longest reference).", show_default=False
    ),
]
