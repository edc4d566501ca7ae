"""The ledger: what became of every row, in numbers and in lines for people. Nothing is dropped, cut or split in silence."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Ledger:
    """What became of every row: nothing is dropped in silence."""

    rows: int = 0
    used: int = 0
    train: int = 0
    test: int = 0
    too_long: int = 0
    too_long_places: list[str] = field(default_factory=list)
    duplicates: int = 0
    contradictions: int = 0
    split_at_border: int = 0
    last_turn_only: int = 0
    cut_at_stop_token: int = 0
    unclosed: int = 0
    """Rows, not counting those cut at max_length, whose stop token is not learned."""
    tokens: int = 0
    supervised_tokens: int = 0
    selection: str = ""
    """Which part of the rows was asked for."""
    empty: int = 0
    """Texts whose fields are all blank."""
    cut: int = 0
    cut_tokens: int = 0
    """Rows cut at max_length, and the tokens this cost."""
    split: int = 0
    pieces: int = 0
    """Rows split over several pieces of max_length tokens, and the number of those."""
    blocks: int = 0
    held_out_blocks: int = 0
    last_block: int = 0
    """Blocks or windows to train on and held out, and the tokens of the last one to train on."""
    without_learned: int = 0
    """Pieces, blocks or windows left out because nothing in them is learned."""
    layout: str = ""
    """How blocks are made, in words."""

    def lines(self) -> list[str]:
        """The ledger for people: one line, and one more for each thing that deserves a look."""
        lines = [
            f"data: {self.rows} rows, {self.train} to train on, {self.test} held out; {self.supervised_tokens} of {self.tokens} tokens are learned"
        ]
        if self.selection:
            lines.append(f"data: only part of the rows is used: {self.selection}")
        if self.blocks:
            held_out = f" and {self.held_out_blocks} held out" if self.held_out_blocks else ""
            lines.append(
                f"data: {self.layout}: {self.blocks} to train on{held_out}; the last has {self.last_block} tokens and is kept"
            )
        if self.split:
            lines.append(
                f"data: {self.split} rows are longer than max_length and split into {self.pieces} pieces; nothing of them is lost"
            )
        if self.without_learned:
            lines.append(f"data: {self.without_learned} pieces or windows hold nothing to learn and are left out")
        if self.empty:
            lines.append(f"data: {self.empty} rows are left out: all fields of their text are blank")
        if self.too_long:
            lines.append(
                f"data: {self.too_long} rows are longer than max_length and left out: {', '.join(self.too_long_places)}{' ...' if self.too_long > 5 else ''}"
            )
        if self.cut:
            lines.append(f"data: {self.cut} rows are cut at max_length, which leaves out {self.cut_tokens} tokens")
        if self.duplicates:
            lines.append(
                f"data: {self.duplicates} rows repeat an earlier row (prompt and answer); all are kept, on the same side of the split"
            )
        if self.contradictions:
            lines.append(f"data: {self.contradictions} prompts come with different answers")
        if self.last_turn_only:
            lines.append(
                f"data: in {self.last_turn_only} conversations only the last answer is learned: the chat template rewrites earlier turns"
            )
        if self.cut_at_stop_token:
            lines.append(
                f"data: {self.cut_at_stop_token} answers hold a stop token of the model in their text and are learned up to it"
            )
        return lines
