"""The commands. Each reads its options, calls the stage function of the same name, and prints what it returned.

Importing this file imports neither torch nor transformers: a command imports its stage when it runs.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from phinetune import __version__
from phinetune.cli.compare import compare
from phinetune.cli.flags import (
    BaseModel,
    Completion,
    ConfigFile,
    Data,
    MaxNewTokens,
    Model,
    Output,
    Overwrite,
    Prompt,
    Quiet,
    Set,
    Split,
)
from phinetune.cli.info import info
from phinetune.cli.plan import Seed, TestFraction, plan
from phinetune.cli.run import migrate, run_file
from phinetune.cli.workflow_files import register as register_workflow_files

app = typer.Typer(
    name="phinetune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="A small language model from your data to your hardware: fine-tune with LoRA, evaluate, merge, export to int4 ONNX, chat.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"phinetune {__version__}")
        raise typer.Exit


@app.command()
def finetune(
    model: Model = None,
    data: Data = None,
    output: Output = None,
    prompt: Prompt = None,
    completion: Completion = None,
    test_fraction: TestFraction = None,
    seed: Seed = None,
    reference: Annotated[
        bool | None,
        typer.Option("--reference", help="Turn every fast path off: plain torch, to compare with.", show_default=False),
    ] = None,
    int4_aware: Annotated[
        bool | None,
        typer.Option(
            "--int4-aware",
            help="Train on the weights as int4 will have them: exporting loses nothing.",
            show_default=False,
        ),
    ] = None,
    on_grid: Annotated[
        bool | None,
        typer.Option(
            "--on-grid",
            help="QLoRA over the integers that the int4 export will hold: the adapter ships beside them.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    no_memory_check: Annotated[
        bool, typer.Option("--no-memory-check", help="Train even if the forecast says that the memory is not enough.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA adapter on a data file.

    Defaults: 3 epochs, batches of 16 examples, rank 16 on all linear layers; learning rate, warm-up and checkpoint interval are derived
    from model and data, and said. The same command after a kill goes on from the last checkpoint.

    --set training_config.KEY=VALUE takes the names of transformers.TrainingArguments, peft_config.KEY those of PEFT's LoraConfig,
    model_kwargs.KEY those of from_pretrained, data.KEY: path, prompt, completion, system, test_fraction, seed, max_length (tokens), text
    (learn whole texts), strategy (rows, join, sliding-window), rows, split, ...; eval_data.KEY: another file, held out whole.
    """
    from phinetune.cli.console import Terminal, out
    from phinetune.cli.options import arguments
    from phinetune.libraries import import_libraries

    import_libraries("phinetune.workflow.finetune", for_good=True)
    from phinetune.workflow.finetune import finetune as stage

    options = {
        "model": model,
        "data.path": data,
        "data.prompt": prompt,
        "data.completion": completion,
        "data.test_fraction": test_fraction,
        "data.seed": seed,
        "training_config.reference": reference,
        "training_config.int4_aware": int4_aware,
        "model_kwargs.load_on_grid": on_grid,
        "output_dir": output,
        "overwrite": overwrite,
        "training_config.skip_memory_check": no_memory_check or None,
    }
    with Terminal(quiet) as on_event:
        given = arguments(stage, config, settings or [], options)
        import_libraries("transformers.training_args", for_good=True)
        result = stage(**given, on_event=on_event)
    figures = result.manifest.get("figures", {})
    loss = f", held-out loss {figures['eval_loss']:.4f}" if "eval_loss" in figures else ""
    out().print(
        f"{result.folder}: {figures.get('steps')} steps in {figures.get('train_seconds')} s, {figures.get('tokens_per_second')} tokens/s{loss}"
    )


@app.command()
def evaluate(
    model: Model = None,
    data: Data = None,
    prompt: Prompt = None,
    completion: Completion = None,
    split: Split = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File for the result as JSON.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Further numbers: perplexity,f1,latency_p50,size,... (docs/concepts.md).", show_default=False
        ),
    ] = None,
    base_model: BaseModel = None,
    config: ConfigFile = None,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """Score any stage's model on held-out examples.

    --model is the output folder of finetune, merge or export, or a base model. For a model that phinetune trained, data file, templates and split default to those of its training.
    """
    from phinetune.cli.console import Terminal, metric_lines, out, stage_table
    from phinetune.cli.options import arguments
    from phinetune.workflow.evaluate import evaluate as stage

    options: dict[str, Any] = {
        "model": model,
        "data.path": data,
        "data.prompt": prompt,
        "data.completion": completion,
        "split": split,
        "output": output,
    }
    options |= {"max_new_tokens": max_new_tokens, "base_model": base_model, "metrics": metrics}
    with Terminal(quiet) as on_event:
        result = stage(**arguments(stage, config, settings or [], options), on_event=on_event)
    console = out()
    console.print(stage_table([result]))
    for line in metric_lines(result):
        console.print(line, markup=False)
    for wrong in result.wrong[:3]:
        console.print(f"wrong: {wrong['place']}: {wrong['answer']!r} instead of {wrong['reference']!r}", markup=False)


app.command()(compare)


@app.command()
def merge(
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Folder that finetune wrote.", show_default=False)
    ] = None,
    output: Output = None,
    base_model: BaseModel = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For an adapter trained on a 4-bit base: original, dequantized or auto, the one that gives the logits of the training (default: auto).",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    quiet: Quiet = False,
) -> None:
    """Fold an adapter into its base model.

    The result is a plain model folder, each tensor in the dtype that the base has on disk. It is written file by file and needs memory
    for one tensor only; a merge that was killed goes on where it was.
    """
    from phinetune.cli.console import Terminal, out
    from phinetune.cli.options import arguments
    from phinetune.workflow.merge import merge as stage

    options = {"adapter": adapter, "output_dir": output, "base_model": base_model, "base": base, "overwrite": overwrite}
    with Terminal(quiet) as on_event:
        result = stage(**arguments(stage, config, settings or [], options), on_event=on_event)
    out().print(str(result.folder), markup=False)


@app.command()
def export(
    model: Model = None,
    output: Output = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="int4, int8, bf16, fp16, fp32 (default: int4).", show_default=False),
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune",
            help="Choose what answers fastest on this CPU, by measurement, within max_drop.",
            show_default=False,
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            help="A,B: adapters of the base model --model, kept apart as FOLDER/A.onnx_adapter.", show_default=False
        ),
    ] = None,
    base_model: BaseModel = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    quiet: Quiet = False,
) -> None:
    """Write a model as a verified ONNX Runtime GenAI folder. An adapter is merged first.

    --set export_config.KEY=VALUE: block_size (weights per scale, default 32), symmetric (true), accuracy_level (0 to 4, default 4),
    algorithm (auto, gptq, mixed, searched, default, rtn, k_quant, ...), max_drop (most that held-out answers may lose, 0.01, or any),
    execution_provider (cpu, cuda, dml, webgpu), and more: docs/config.md.
    Adapters that are kept apart are switched while the model runs: chat and evaluate take FOLDER/A.onnx_adapter.
    """
    from phinetune.cli.console import Terminal, out
    from phinetune.cli.options import arguments
    from phinetune.workflow.export import export as stage

    options = {
        "model": model,
        "output_dir": output,
        "export_config.precision": precision,
        "export_config.tune": tune,
        "adapters": [name.strip() for name in adapters.split(",") if name.strip()] if adapters is not None else None,
        "base_model": base_model,
        "overwrite": overwrite,
    }
    with Terminal(quiet) as on_event:
        result = stage(**arguments(stage, config, settings or [], options), on_event=on_event)
    out().print(str(result.folder), markup=False)


@app.command()
def chat(
    message: Annotated[
        str | None,
        typer.Argument(
            help="One message to answer; without it, a conversation (or one message a line from a pipe).",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Send messages as they stand, not in the column template of the training.", show_default=False
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token; above: drawn at that temperature.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Draw among the likeliest tokens that make up this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for drawing.")] = 0,
    base_model: BaseModel = None,
    settings: Set = None,
    quiet: Quiet = False,
) -> None:
    """Talk to a model of any stage.

    --model is a base model, an adapter, a merged model or an ONNX folder; of --set only model_kwargs.KEY is taken. A model that was
    trained with a column template of one field gets each message in that template.
    """
    from phinetune.cli.chat import run_chat
    from phinetune.generation.protocol import Sampling

    run_chat(
        message,
        model,
        system,
        raw,
        Sampling(max_new_tokens, temperature, top_p, seed),
        base_model,
        settings or [],
        quiet,
    )


@app.command()
def quickstart(
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Output folder (default: phinetune-quickstart).", show_default=False),
    ] = None,
    config: ConfigFile = None,
    settings: Set = None,
    overwrite: Overwrite = None,
    quiet: Quiet = False,
) -> None:
    """The whole way with the embedded model and bundled data.

    Fine-tunes, merges, exports to int4 ONNX, compares base, adapter, merged model and ONNX on held-out examples, and answers three
    phrases that are in no data set. Writes results.json and report.html beside the stages' folders.
    """
    from phinetune.cli.console import Terminal, comparison_lines, comparison_table, out
    from phinetune.cli.options import arguments
    from phinetune.workflow.quickstart import quickstart as stage

    with Terminal(quiet) as on_event:
        result = stage(
            **arguments(stage, config, settings or [], {"output_dir": output, "overwrite": overwrite}),
            on_event=on_event,
        )
    console = out()
    console.print()
    console.print(comparison_table(result.comparison.stages))
    for line in comparison_lines(result.comparison):
        console.print(line, markup=False)
    console.print()
    for phrase, answer in result.answers:
        console.print(f"{answer:<10}{phrase}", markup=False)
    console.print(
        f"\n{result.comparison.folder}/report.html and results.json written after {result.seconds:.0f} s. "
        f"Try: phinetune chat --model {result.comparison.folder}/onnx-int4",
        markup=False,
    )


app.command()(plan)
app.command("run")(run_file)
app.command()(migrate)
app.command()(info)
register_workflow_files(app)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for what the user can mend, 130 when interrupted. Bugs propagate (exit code 1)."""
    from phinetune.errors import PhinetuneError

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes are about itself; what matters here we say
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a kernel that is not used
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException, from whichever click this typer brings
    try:
        result: Any = app(args=argv, prog_name="phinetune", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except PhinetuneError as error:
        from phinetune.cli.console import show_error

        show_error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\ninterrupted; the same command goes on from the last checkpoint, where there is one\n")
        return 130
    except BrokenPipeError:
        return 0
    except usage_error as error:
        error.show()
        return int(error.exit_code)


def run() -> None:
    """The `phinetune` command."""
    sys.exit(main())
