"""The command line. Nothing heavy is imported before a command needs it: `earloom --help` answers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import deploy_commands, lake_commands, model_commands, team_commands
from pipelines.lake_commands import Lake

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.config import RunConfig

app = typer.Typer(
    help="The speech-LLM survey you can run: from audio to a trained, evaluated, registered speech LLM.\n\n"
    "Example: earloom run --arch funasr_llm --data my_recordings/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
)
recipes = typer.Typer(help="Look at what an architecture trains, and when.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")

Arch = Annotated[str, typer.Option("--arch", help="Architecture; `earloom architectures` lists them.")]
Data = Annotated[
    str, typer.Option("--data", help="Folder or manifest of audio with transcripts; a path or any fsspec URL (s3://…).")
]
RecipeFile = Annotated[
    str | None, typer.Option("--recipe", help="YAML file with settings, as `earloom recipe show` prints them.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, e.g. workers=2 recipe.stages.lora.epochs=0.5", show_default=False
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the logs of Prefect and Ray.")]

# Enough for a corpus of sixty words; a person's own data take the whole recipe.
DEMO_SETTINGS = {
    "funasr_llm": ("recipe.stages.lora.epochs=0.4",),
    "salmonn": ("recipe.stages.instruct.tasks={asr: 1.0}", "recipe.stages.instruct.max_steps=35"),
    "speechgpt": ("recipe.stages.adapt.max_steps=8", "recipe.stages.cross.max_steps=40"),
}


def main() -> None:
    """Entry point: errors that a person can mend are one line, not a traceback."""
    import gc

    from infra.environment import prepare

    gc.set_threshold(50_000)  # else cycles are looked for hundreds of times while Prefect and torch are imported
    prepare()
    try:
        app()
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        import os

        if os.environ.get("EARLOOM_DEBUG"):
            raise
        from infra.secrets import redacted

        said = str(error.args[0] if isinstance(error, LookupError) and error.args else error)
        typer.secho(f"error: {redacted(said)}", fg="red", err=True)
        raise SystemExit(1) from None
    finally:
        gc.freeze()  # all ends with the process: to look for cycles in what torch and Ray made takes seconds


def _config(
    arch: str, data: str, recipe: str | None, lake: str | None, settings: list[str] | None, verbose: bool = False
) -> RunConfig:
    from pipelines.overrides import parse_words, read_recipe_file, run_config

    if verbose:
        import os

        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
    given: dict[str, Any] = {"arch": arch, "data": data} | ({"lake": lake} if lake else {})
    return run_config((read_recipe_file(recipe) if recipe else {}) | given | parse_words(settings or []))


@app.command(epilog="Example: earloom run --arch funasr_llm --data ../shared/data/fsdd recipe.stages.lora.epochs=2")
def run(
    arch: Arch,
    data: Data,
    recipe: RecipeFile = None,
    lake: Lake = None,
    settings: Settings = None,
    verbose: Verbose = False,
) -> None:
    """The whole chain: ingest → cache → train → evaluate → register.

    What is up to date is left alone; killed at any moment, the same command goes on.
    """
    _run(_config(arch, data, recipe, lake, settings, verbose))


def _run(config: RunConfig, clip: str = "FILE.wav") -> None:
    from infra import cluster
    from pipelines import crew, server
    from pipelines.workspace import shared

    server.wake()
    crew.begin(config, f"runs/{config.arch}")
    try:
        with shared(config) as work:
            _ = work.preset  # a wrong change of it is said before Prefect is imported, which takes longer
            from pipelines.chain import chain
            from pipelines.summary import show_run, show_stages

            with server.reached():
                result = chain(config)
    finally:
        cluster.disconnect()  # it may have begun for nothing
    show_stages(result.reports, result.seconds)
    show_run(config, result.report_url, clip)


# Each stage alone: name -> (help, example)
STAGES = {
    "ingest": (
        "Audio and transcripts → WebDataset shards with an index; bad files go to rejects.jsonl with a reason.",
        "earloom ingest --arch funasr_llm --data my_recordings/ per_shard=512",
    ),
    "cache": (
        "Run the frozen encoders once over every clip; fit and cache units for discrete systems.",
        "earloom cache --arch salmonn --data my_recordings/",
    ),
    "train": (
        "Train the recipe's stages in order; finished ones are left alone, an interrupted one goes on.",
        "earloom train --arch funasr_llm --data recordings/ workers=2 recipe.stages.lora.optimiser.lr=5e-4",
    ),
    "evaluate": (
        "Word error rate or accuracy on held-out clips, before and after training.",
        "earloom evaluate --arch funasr_llm --data my_recordings/ split=dev eval_clips=100",
    ),
    "register": (
        "Publish the model's folder and make it a version in the MLflow registry.",
        "earloom register --arch funasr_llm --data my_recordings/ name=my-asr alias=candidate",
    ),
}


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        arch: Arch,
        data: Data,
        recipe: RecipeFile = None,
        lake: Lake = None,
        settings: Settings = None,
        verbose: Verbose = False,
    ) -> None:
        import importlib

        from infra import cluster
        from pipelines import crew, server
        from pipelines.summary import show_stages
        from pipelines.workspace import shared

        config = _config(arch, data, recipe, lake, settings, verbose)
        server.wake()
        if name == "ingest":
            crew.begin(config, "audio")
        try:
            with shared(config) as work:
                if name != "ingest":  # which does without the architecture, and so starts several seconds sooner
                    _ = work.preset
                stage: Callable[[RunConfig], Any] = getattr(importlib.import_module(f"pipelines.{name}"), name)
                with server.reached():
                    made = stage(config)
        finally:
            cluster.disconnect()
        show_stages(made if isinstance(made, list) else [made])

    return command


for _name, (_help, _example) in STAGES.items():
    if _name == "cache":
        lake_commands.add_caches(app, _stage_command(_name), _help, _example)
    else:
        app.command(_name, help=_help, epilog=f"Example: {_example}")(_stage_command(_name))
app.command(epilog="Example: earloom trace --speaker s01 --lake s3://bucket/lake")(lake_commands.trace)
deploy_commands.add(app)
team_commands.add(app)
model_commands.add(app)


Stage = Annotated[str | None, typer.Option("--stage", help="Stage of the recipe; default: all, or the first.")]


@app.command(epilog="Example: earloom plan --arch salmonn --data my_recordings/ curriculum.order=duration")
def plan(
    arch: Arch,
    data: Data,
    recipe: RecipeFile = None,
    lake: Lake = None,
    stage: Stage = None,
    settings: Settings = None,
) -> None:
    """In which order training will see the samples: computed before it starts, as a table and a page to look at.

    Needs the stages ingest and cache. Training uses the very plan that is shown.
    """
    from pipelines.looking import show_plans

    show_plans(_config(arch, data, recipe, lake, settings), stage)


@app.command(
    epilog="Example: earloom explain --arch funasr_llm --data my_recordings/ --stage lora --step 3 --page x.html"
)
def explain(
    arch: Arch,
    data: Data,
    recipe: RecipeFile = None,
    lake: Lake = None,
    stage: Stage = None,
    step: Annotated[int, typer.Option(help="Which global batch of the stage, from 0.")] = 0,
    clip: Annotated[str | None, typer.Option(help="Key of one clip instead of a batch.")] = None,
    page: Annotated[str | None, typer.Option(help="Also write an HTML page here.")] = None,
    settings: Settings = None,
) -> None:
    """Each token of a batch: its text, whether it is audio, its position, and whether it is learnt and how much.

    Needs the stages ingest and cache. The batch is made by the code that makes it in training.
    """
    from pathlib import Path

    from pipelines.looking import explain_stage

    config = _config(arch, data, recipe, lake, settings)
    explain_stage(config, stage, step, clip, Path(page) if page else None)


@app.command("fit-memory", epilog="Example: earloom fit-memory --arch salmonn --data my_recordings/ preset=paper")
def fit_memory(
    arch: Arch,
    data: Data,
    recipe: RecipeFile = None,
    lake: Lake = None,
    stage: Stage = None,
    settings: Settings = None,
) -> None:
    """Find how many tokens fit into memory at a time and which form of a batch is faster, with a few probes.

    Kept in the lake for this architecture, sizes, freeze plan and device; training uses it from then on.
    """
    from pipelines.fit import fit_stages

    fit_stages(_config(arch, data, recipe, lake, settings), stage)


@app.command(epilog='Example: earloom listen funasr_llm-demo@candidate clip.wav "Transcribe speech to text."')
def listen(
    model: Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME/version of a registered model.")],
    file: Annotated[str, typer.Argument(help="Audio file; any rate and channels, a path or URL.")],
    question: Annotated[str | None, typer.Argument(help="What to ask; default: transcribe.")] = None,
    lake: Lake = None,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server; default: the lake's own.")] = None,
) -> None:
    """Let a registered model answer about an audio file."""
    from pipelines.config import RunConfig
    from pipelines.listening import listen as answer
    from pipelines.locate import Workspace

    config = RunConfig(arch="-", data="-", tracking_uri=tracking_uri, **({"lake": lake} if lake else {}))
    typer.echo(answer(model, file, question, Workspace(config).tracking_uri))


@app.command(epilog="Example: earloom architectures --markdown")
def architectures(
    markdown: Annotated[bool, typer.Option("--markdown", help="All systems of the list, as a Markdown table.")] = False,
    into: Annotated[str | None, typer.Option(help="Put that table into this document, between its two marks.")] = None,
) -> None:
    """The architectures that can be run, with their sizes as published."""
    from pathlib import Path

    from pipelines import catalogue

    if into is not None:
        catalogue.write_markdown(Path(into))
    elif markdown:
        typer.echo(catalogue.markdown())
    else:
        catalogue.show_architectures()


@app.command("import-checkpoint", epilog="Example: earloom import-checkpoint salmonn salmonn_v1.pth --check")
def import_checkpoint(
    name: Annotated[str, typer.Argument(help="Architecture.")],
    file: Annotated[str, typer.Argument(help="The official file, or a folder with it or with its shards.")],
    to: Annotated[str | None, typer.Option(help="Folder to write. Default: ./NAME-imported")] = None,
    preset: Annotated[str, typer.Option(help="paper, small or tiny: whose sizes the file has.")] = "paper",
    backbone: Annotated[str | None, typer.Option(help="Another backbone: a hub id or folder.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only compare names and shapes: loads no weights.")] = False,
    settings: Settings = None,
) -> None:
    """Official weights → a transformers folder of ours, with every tensor accounted for. Start with --check.

    Without it the preset's pretrained parts are loaded too; say where those are that no hub has, as in
    encoders.audio.weights=BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt
    """
    from pipelines.importing import import_checkpoint as imported

    imported(name, file, to, preset, backbone, settings, check)


@recipes.command("show", epilog="Example: earloom recipe show funasr_llm --preset paper > my.yaml")
def recipe_show(
    name: Annotated[str, typer.Argument(help="Architecture.")],
    preset: Annotated[str, typer.Option(help="paper, small or tiny.")] = "small",
) -> None:
    """Print a preset as YAML: parts, stages in order, every value with its default; `--recipe` reads it back."""
    from pipelines.catalogue import show_recipe

    show_recipe(name, preset)


@app.command(epilog="Example: earloom demo --arch speechgpt")
def demo(
    arch: Annotated[str, typer.Option("--arch", help="Architecture.")] = "funasr_llm",
    folder: Annotated[str, typer.Option(help="Where corpus and lake go.")] = "demo",
    clips: Annotated[int, typer.Option(help="Clips that are spoken.")] = 1000,
    settings: Settings = None,
) -> None:
    """Speak a small corpus with eSpeak NG, then run the whole chain on it with real weights."""
    from pathlib import Path

    from pipelines import server

    server.wake()
    from components.corpus.speak import speak_corpus
    from pipelines.progress import console

    corpus = speak_corpus(Path(folder) / "corpus", clips)
    console.print(f"[bold]corpus[/bold]\n  {clips:,} clips of synthetic speech: {corpus}")
    words = [*DEMO_SETTINGS.get(arch, ()), "baseline_clips=32", *(settings or []), "dataset=demo"]
    lake = str(Path(folder) / "lake")
    console.print(f"  earloom run --arch {arch} --data {corpus.parent} --lake {lake} {' '.join(words)}", soft_wrap=True)
    held_out = sorted((corpus.parent / "audio").glob("test-*"))
    _run(_config(arch, str(corpus.parent), None, lake, words), str(held_out[0]))


if __name__ == "__main__":
    main()
