"""Byte-level BPE in plain Python: the independent route that tokenizer goldens are made by (needs `regex`).

Pre-tokenizer patterns are llama.cpp's, each applied to the pieces the one before leaves.
"""

from itertools import pairwise

import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LETTERS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}",),
    "qwen2": (rf"{LETTERS}|\p{{N}}|{REST}",),
}


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def split(text: str, pattern: str) -> list[str]:
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        pieces += [text[end : match.start()], match[0]]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def encode(text: str, vocab: dict[str, int], merges: list[str], pre: str) -> list[int]:
    """Token ids of a text without special tokens."""
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    alphabet = byte_alphabet()
    pieces = [text]
    for pattern in PATTERNS[pre]:
        pieces = [part for piece in pieces for part in split(piece, pattern)]
    ids = []
    for piece in pieces:
        word = "".join(alphabet[byte] for byte in piece.encode())
        symbols = [word] if pre == "llama-bpe" and word in vocab else list(word)
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(symbols):
                pair = tuple(symbols[i : i + 2])
                merged.append("".join(pair) if pair == best else symbols[i])
                i += 2 if pair == best else 1
            symbols = merged
        ids += [vocab[symbol] for symbol in symbols]
    return ids


def encode_with_special(
    text: str, special: list[str], vocab: dict[str, int], merges: list[str], pre: str
) -> list[int]:
    """Token ids of a text in which special tokens are written out."""
    pieces = regex.split("(" + "|".join(map(regex.escape, special)) + ")", text)
    parts = ([vocab[p]] if p in special else encode(p, vocab, merges, pre) for p in pieces)
    return [token for part in parts for token in part]
