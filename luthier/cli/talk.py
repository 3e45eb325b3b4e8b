"""luthier generate and luthier chat: a base with deltas on it, answering."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[
    str, typer.Argument(help="Base by name or folder: 'practice' is built in. Or an assembly.", show_default=False)
]
Deltas = Annotated[
    list[str] | None,
    typer.Option("--delta", "-d", help="Delta or PEFT folder; may be given several times.", show_default=False),
]
Length = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Heat = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
Raw = Annotated[bool, typer.Option("--raw", help="Go on from the text itself, without the chat template.")]


def generate(
    base: Base,
    delta: Deltas = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; may be given several times.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="One prompt a line, or JSONL with 'prompt' or 'messages'.", show_default=False
        ),
    ] = None,
    max_new_tokens: Length = 256,
    temperature: Heat = 0.0,
    seed: Seed = 0,
    raw: Raw = False,
    draft: Annotated[
        int,
        typer.Option(
            "--draft", min=0, help="Tokens that an assembly's small model writes ahead at a time; 0 for none."
        ),
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per prompt.")] = False,
) -> None:
    """Answer prompts with a base and its deltas."""
    import json as writer

    from luthier.cli.console import plain, say
    from luthier.errors import LuthierError
    from luthier.verbs.generate import Speaker, read_prompts

    if bool(prompt) == bool(file):
        raise LuthierError("luthier generate: give prompts by --prompt TEXT or by --file FILE, one of the two")
    asked = read_prompts(file) if file else list(prompt or ())
    speaker = Speaker(base, delta or ())
    answers = speaker.answer(
        asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, raw=raw, draft=draft
    )
    for question, answer in zip(asked, answers, strict=True):
        plain(writer.dumps({"prompt": question, "response": answer}, ensure_ascii=False) if json else answer)
    if (found := speaker.drafting) is not None:
        say(f"drafted {found.drafted:,} tokens, kept {found.share:.0%}, in {found.passes:,} passes of the large model")


def chat(
    base: Base,
    delta: Deltas = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)] = None,
    max_new_tokens: Length = 256,
    temperature: Heat = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk to a base with deltas. An empty line or Ctrl-D ends; /new starts over; /base asks the base alone."""
    from luthier.cli.console import out, plain, say
    from luthier.verbs.generate import Speaker, check_heat

    check_heat(temperature)
    speaker = Speaker(base, delta or ())
    begin = [{"role": "system", "content": system}] if system else []
    turns, bare = list(begin), False
    say("an empty line ends, /new starts over, /base switches the deltas off and on")
    while True:
        try:
            text = out().input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            turns = list(begin)
        elif text == "/base":
            bare = not bare
            say("the base alone" if bare else "the base with its deltas")
        else:
            turns.append({"role": "user", "content": text})
            answer = speaker.answer(
                [turns], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, without=bare
            )[0]
            turns.append({"role": "assistant", "content": answer})
            plain(answer)
