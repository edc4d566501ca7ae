"""The chat in the terminal: one answer, a conversation, or one message a line from a pipe."""

from __future__ import annotations

import sys

from phinetune.cli.console import Terminal, out, show_error
from phinetune.config import apply_settings
from phinetune.errors import ConfigError, PhinetuneError
from phinetune.events import Note
from phinetune.generation.load import find, find_manifest, load_generator
from phinetune.generation.protocol import Sampling
from phinetune.serving.chat import ChatSession, prompt_template, single_field_template


def run_chat(
    message: str | None,
    model: str | None,
    system: str | None,
    raw: bool,
    sampling: Sampling,
    base_model: str | None,
    settings: list[str],
    quiet: bool,
) -> None:
    """Load `model` and answer until the input ends. Raises ConfigError without a model."""
    kwargs = apply_settings({}, settings)
    model_kwargs = kwargs.pop("model_kwargs", None)
    if kwargs:
        raise ConfigError([f"{key}: unknown key" for key in kwargs], "chat takes model_kwargs.KEY only")
    if model is None:
        raise ConfigError("model: this key is needed", "give --model")
    with Terminal(quiet) as on_event:
        folder, _ = find(model, model_kwargs, on_event)
        trained = find_manifest(model, folder).get("data") or {}
        template = None if raw else single_field_template(prompt_template(trained))
        on_texts = trained.get("chat", True) is False
        if on_texts and system:
            raise ConfigError(
                "system: the model was trained on texts without a chat template and knows no system message"
            )
        system = system or trained.get("system")
        generator = load_generator(model, model_kwargs, None, base_model, on_event)
        if template is not None:
            on_event(
                Note(f"chat: each message fills the prompt of the training, {template!r} (--raw sends it as it stands)")
            )
        elif on_texts:
            on_event(Note("chat: the model was trained on texts; it goes on from each message as it stands"))
    session = ChatSession(generator, sampling, system, template, chat=not on_texts)
    if message is not None:
        _answer(session, message)
    elif sys.stdin.isatty():
        _converse(session)
    else:
        for line in sys.stdin:
            if line.strip():
                _answer_or_say(session, line.strip())


def _answer_or_say(session: ChatSession, text: str) -> None:
    """In a conversation, an answer that cannot be given is said and the conversation goes on."""
    try:
        _answer(session, text)
    except PhinetuneError as error:
        show_error(error)


def _answer(session: ChatSession, text: str) -> None:
    for piece in session.reply(text):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _converse(session: ChatSession) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    out().print("Type a message. /reset forgets the conversation, /quit (or Ctrl-D) ends it.", style="dim")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            session.reset()
        elif text:
            _answer_or_say(session, text)
