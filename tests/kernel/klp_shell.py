"""A reader and interpreter of the part of bash that the kernel's livepatch selftests are written in.

What it does not know it refuses (:class:`Unsupported`), so that no line of a script is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class Unsupported(Exception):
    """A construct or command that this interpreter does not have; the text says which."""


class Exit(Exception):
    """The script called ``exit``."""


#: A word in pieces: (text, whether blanks in it separate words, whether it is to be expanded).
Piece = tuple[str, bool, bool]
Word = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Simple:
    """A command with its words; ``output`` is the file that its output goes to."""

    words: tuple[Word, ...]
    output: Word | None = None


@dataclass(frozen=True, slots=True)
class Assign:
    """``NAME=WORD``, ``NAME[INDEX]=WORD`` or ``NAME=(WORDS)``."""

    name: str
    index: Word | None
    value: tuple[Word, ...]
    array: bool


@dataclass(frozen=True, slots=True)
class Pipe:
    """Commands joined by ``|``."""

    commands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """Commands joined by ``&&`` and ``||``."""

    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True, slots=True)
class Background:
    """``COMMAND &``."""

    command: Node


@dataclass(frozen=True, slots=True)
class If:
    """``if … then … fi``."""

    condition: tuple[Node, ...]
    body: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class For:
    """``for NAME in WORDS; do … done``."""

    name: str
    words: tuple[Word, ...]
    body: tuple[Node, ...]


Node = Simple | Assign | Pipe | Chain | Background | If | For

_NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATORS = ("&&", "||", ";;", "|", "&", ";", "\n", ">", "(", ")")


def _balanced(text: str, start: int, left: str, right: str) -> int:
    """The position after the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == left) - (text[i] == right)
        if not depth:
            return i + 1
    raise Unsupported(f"no {right} closes {text[start : start + 40]!r}")


def _dollar(text: str, i: int) -> int:
    """The position after the expansion that begins at ``i`` (a dollar sign)."""
    after = text[i + 1 : i + 2]
    if after == "(":
        return _balanced(text, i + 1, "(", ")")
    if after == "{":
        return _balanced(text, i + 1, "{", "}")
    if after and after in "!?#@*$0":
        return i + 2
    match = _NAME.match(text, i + 1)
    return match.end() if match else i + 1


def tokens(text: str) -> list[str | Word]:
    """Operators as strings and words as tuples of pieces."""
    found: list[str | Word] = []
    i = 0
    while i < len(text):
        char = text[i]
        if char in " \t":
            i += 1
        elif text.startswith("\\\n", i):
            i += 2
        elif char == "#":
            i = text.find("\n", i) if "\n" in text[i:] else len(text)
        elif operator := next((op for op in _OPERATORS if text.startswith(op, i)), ""):
            found.append(operator)
            i += len(operator)
        else:
            word, i = _word(text, i)
            found.append(word)
    return found


def _word(text: str, i: int) -> tuple[Word, int]:
    pieces: list[Piece] = []
    bare = ""
    while i < len(text):
        char = text[i]
        if char in " \t" or any(text.startswith(op, i) for op in _OPERATORS):
            if char == "(" and bare.endswith("="):  # an array: NAME=(…)
                break
            if char != "(" or not bare:
                break
        if char == "'" or text.startswith("$'", i):
            start = i + (2 if char == "$" else 1)
            end = text.index("'", start)
            if char == "$" and "\\" in text[start:end]:
                raise Unsupported(f"escapes in {text[i : end + 1]}")
            pieces += [(bare, True, True), (text[start:end], False, False)]
            bare, i = "", end + 1
        elif char == '"':
            pieces.append((bare, True, True))
            bare = ""
            quoted, i = _double(text, i + 1)
            pieces += quoted
        elif char == "\\":
            pieces += [(bare, True, True), (text[i + 1], False, False)]
            bare, i = "", i + 2
        elif char == "$":
            end = _dollar(text, i)
            bare += text[i:end]
            i = end
        else:
            bare += char
            i += 1
    pieces.append((bare, True, True))
    quoted_empty = any(not piece[0] and not piece[1] for piece in pieces)
    return tuple(piece for piece in pieces if piece[0] or (quoted_empty and not piece[1])), i


def _double(text: str, i: int) -> tuple[list[Piece], int]:
    """The inside of double quotes from ``i``, and the position after them."""
    pieces: list[Piece] = []
    run = ""
    while text[i] != '"':
        if text[i] == "\\" and text[i + 1] in '"\\$`':
            pieces += [(run, False, True), (text[i + 1], False, False)]
            run, i = "", i + 2
        elif text[i] == "$":
            end = _dollar(text, i)
            run += text[i:end]
            i = end
        else:
            run += text[i]
            i += 1
    pieces.append((run, False, True))
    return pieces, i + 1


def plain(word: str | Word) -> str:
    """A word's text as it stands, '' for an operator."""
    return "" if isinstance(word, str) else "".join(piece[0] for piece in word)


class Parser:
    """Recursive descent over the tokens."""

    def __init__(self, text: str) -> None:
        self.tokens = tokens(text)
        self.at = 0

    def peek(self) -> str | Word:
        return self.tokens[self.at] if self.at < len(self.tokens) else "EOF"

    def take(self) -> str | Word:
        token = self.peek()
        self.at += 1
        return token

    def keyword(self) -> str:
        """The next word when it could be a reserved one."""
        token = self.peek()
        return plain(token) if not isinstance(token, str) and len(token) == 1 and token[0][1] else ""

    def expect(self, word: str) -> None:
        if self.keyword() != word:
            raise Unsupported(f"{word} expected, {self.peek()!r} found")
        self.take()

    def skip(self) -> None:
        while self.peek() in (";", "\n"):
            self.take()

    def body(self, *ends: str) -> tuple[Node, ...]:
        """Commands up to one of the reserved words (which is not taken), or the end."""
        nodes = []
        self.skip()
        while self.peek() != "EOF" and self.keyword() not in ends:
            nodes.append(self.chain())
            self.skip()
        return tuple(nodes)

    def chain(self) -> Node:
        first = self.pipe()
        rest = []
        while (operator := self.peek()) in ("&&", "||"):
            self.take()
            self.skip()
            rest.append((str(operator), self.pipe()))
        node: Node = Chain(first, tuple(rest)) if rest else first
        if self.peek() == "&":
            self.take()
            return Background(node)
        return node

    def pipe(self) -> Node:
        commands = [self.command()]
        while self.peek() == "|":
            self.take()
            commands.append(self.command())
        return Pipe(tuple(commands)) if len(commands) > 1 else commands[0]

    def command(self) -> Node:
        match self.keyword():
            case "if":
                self.take()
                condition = self.body("then")
                self.expect("then")
                body = self.body("fi")
                self.expect("fi")
                return If(condition, body)
            case "for":
                self.take()
                name = plain(self.take())
                self.expect("in")
                words = []
                while not isinstance(self.peek(), str):
                    words.append(self.take())
                self.skip()
                self.expect("do")
                body = self.body("done")
                self.expect("done")
                return For(name, tuple(w for w in words if not isinstance(w, str)), body)
            case "while" | "case" | "function" | "until":
                raise Unsupported(self.keyword())
            case _:
                return self.simple()

    def simple(self) -> Node:
        if (found := self.assignment()) is not None:
            return found
        words: list[Word] = []
        output = None
        double = self.keyword() == "[["
        while True:
            token = self.peek()
            if isinstance(token, str):
                if double and token in ("&&", "||", "(", ")", ">"):
                    raise Unsupported(f"{token} inside [[ ]]")
                if token != ">":
                    break
                self.take()
                target = self.take()
                if isinstance(target, str):
                    raise Unsupported("a redirection without a file")
                output = target
                continue
            words.append(token)
            self.take()
        if not words:
            raise Unsupported(f"a command begins with {self.peek()!r}")
        return Simple(tuple(words), output)

    def assignment(self) -> Assign | None:
        token = self.peek()
        if isinstance(token, str) or not token or not token[0][1]:
            return None
        match = re.match(r"([A-Za-z_]\w*)(?:\[([^\]]*)\])?=", token[0][0])
        if match is None:
            return None
        self.take()
        index = None if match[2] is None else ((match[2], False, True),)
        rest = token[0][0][match.end() :]
        value: Word = (*(((rest, True, True),) if rest else ()), *token[1:])
        if self.peek() == "(" and not value:
            self.take()
            words = []
            while self.peek() != ")":
                word = self.take()
                if isinstance(word, str):
                    raise Unsupported("an array over several lines")
                words.append(word)
            self.take()
            return Assign(match[1], None, tuple(words), True)
        return Assign(match[1], index, (value,), False)


#: A command: its words after the first, its standard input -> (status, output).
Command = Callable[[list[str], str], tuple[int, str]]


@dataclass
class Shell:
    """Runs nodes. ``commands`` are what the script may call; ``write`` is given what goes to files."""

    commands: dict[str, Command]
    write: Callable[[str, str], None]
    glob: Callable[[str], list[str]]
    variables: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, dict[int, str]] = field(default_factory=dict)
    out: list[str] = field(default_factory=list)

    def script(self, text: str) -> int:
        """Run a text; returns the status of its last command."""
        status = 0
        for node in Parser(text).body():
            status = self.run(node)
        return status

    def run(self, node: Node, given: str = "") -> int:
        """Run one node; its output is appended to ``out``."""
        match node:
            case Simple(words, output):
                status, text = self.simple(self.expand(words), given)
                if output is None:
                    self.out.append(text)
                elif text:
                    self.write(self.text(output), text)
                return status
            case Assign(name, index, value, array):
                if array:
                    self.arrays[name] = dict(enumerate(self.expand(value)))
                elif index is not None:
                    self.arrays.setdefault(name, {})[int(self.text(index))] = self.text(value[0])
                else:
                    self.variables[name] = self.text(value[0])
                return 0
            case Pipe(commands):
                status = 0
                for command in commands:
                    keep, self.out = self.out, []
                    status = self.run(command, given)
                    given, self.out = "".join(self.out), keep
                self.out.append(given)
                return status
            case Chain(first, rest):
                status = self.run(first)
                for operator, command in rest:
                    if (status == 0) == (operator == "&&"):
                        status = self.run(command)
                return status
            case Background(Simple(words, _)):
                self.variables["!"] = self.simple([*self.expand(words), "&"], "")[1]
                return 0
            case If(condition, body):
                status = 0
                for part in condition:
                    status = self.run(part)
                if status:
                    return 0
                return self.each(body)
            case For(name, words, body):
                status = 0
                for word in self.expand(words):
                    self.variables[name] = word
                    status = self.each(body)
                return status
            case _:
                raise Unsupported(repr(node))

    def each(self, nodes: Sequence[Node]) -> int:
        status = 0
        for node in nodes:
            status = self.run(node)
        return status

    def simple(self, words: list[str], given: str) -> tuple[int, str]:
        """One command by its expanded words."""
        if not words:
            return 0, ""
        if words[0] in ("[", "[["):
            return self.test(words[1:-1]), ""
        command = self.commands.get(words[0])
        if command is None:
            raise Unsupported(f"the command {words[0]}")
        return command(words[1:], given)

    def test(self, words: list[str]) -> int:
        """``[[ A == B ]]`` and its like; 0 is true."""
        match words:
            case [left, "==" | "=", right]:
                return int(left != right)
            case [left, "!=", right]:
                return int(left == right)
            case [left, "-eq", right]:
                return int(int(left) != int(right))
            case [left, "-ne", right]:
                return int(int(left) == int(right))
            case _:
                raise Unsupported(f"the test {words}")

    def text(self, word: Word) -> str:
        """A word as one string."""
        return "".join(self.value(text) if expand else text for text, _, expand in word)

    def expand(self, words: Sequence[Word]) -> list[str]:
        """Words as a command gets them: unquoted expansions are split at blanks and globbed."""
        found: list[str] = []
        for word in words:
            parts = [""]
            quoted = False
            for text, split, expand in word:
                value = self.value(text) if expand else text
                quoted = quoted or not split
                if split and "$" in text:
                    pieces = value.split()
                    if not pieces:
                        continue
                    parts[-1] += pieces[0]
                    parts += pieces[1:]
                else:
                    parts[-1] += value
            if not quoted and any("*" in part for part in parts):
                parts = [name for part in parts for name in self.glob(part)]
            found += [part for part in parts if part or quoted]
        return found

    def value(self, text: str) -> str:
        """A text with its expansions done."""
        out = ""
        i = 0
        while i < len(text):
            if text[i] != "$":
                out += text[i]
                i += 1
                continue
            end = _dollar(text, i)
            out += self.expansion(text[i:end])
            i = end
        return out

    def expansion(self, text: str) -> str:
        """One expansion, dollar sign included."""
        if text.startswith("$(("):
            return str(self.arithmetic(text[3:-2]))
        if text.startswith("$("):
            keep, self.out = self.out, []
            self.script(text[2:-1])
            result, self.out = "".join(self.out).rstrip("\n"), keep
            return result
        if text.startswith("${#") and text.endswith("[@]}"):
            return str(len(self.arrays.get(text[3:-4], {})))
        if text.startswith("${") and text.endswith("[@]}"):
            return " ".join(self.arrays.get(text[2:-4], {}).values())
        name = text[2:-1] if text.startswith("${") else text[1:]
        if name and not re.fullmatch(r"[A-Za-z_]\w*|[!0]", name):
            raise Unsupported(f"the expansion {text}")
        return self.variables.get(name, "") if name else "$"

    def arithmetic(self, text: str) -> int:
        """``A < B ? C : D`` of numbers and variables."""
        match = re.fullmatch(r"\s*(\S+)\s*<\s*(\S+)\s*\?\s*(\S+)\s*:\s*(\S+)\s*", text)
        if match is None:
            raise Unsupported(f"the arithmetic {text}")
        a, b, c, d = (int(self.value(part)) for part in match.groups())
        return c if a < b else d
