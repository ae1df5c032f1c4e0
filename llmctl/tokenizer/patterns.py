"""Regular expressions of strangers, judged before an engine that backtracks runs them.

A backtracking engine (Python's `re`, Oniguruma) tries every way in which a pattern can match a text. `(a+)+b` has 2^n
ways on n letters and never ends. The number of ways is estimated from the pattern alone; the patterns of published
models stay thousands of times below the limit. Reads the syntax that both engines share and refuses the rest.
"""

from dataclasses import dataclass

from llmctl.errors import ArtifactError

MAX_CHARS = 10_000
MAX_DEPTH = 50
MAX_WAYS = 1 << 18
"""Four unbounded repetitions in a row (`.*.*.*.*`) or their like; GPT-4o's pattern has about 2,000 ways."""
UNBOUNDED_WAYS = 16
MANY = 1 << 62
HINT = "do not trust this file; ask where it was made"
GROUPS = ("?:", "?=", "?!", "?<=", "?<!", "?>")


@dataclass(frozen=True)
class Part:
    """A part of a pattern: the fewest characters it matches, the number of ways, whether they differ in length."""

    shortest: int
    ways: int
    varies: bool = False
    is_group: bool = False


class EndlessPatternError(ArtifactError):
    """Matching a pattern could take forever."""


def check_pattern(pattern: str, where: str) -> int:
    """Return the length of the shortest text that a pattern matches.

    Raises: EndlessPatternError if matching it could take forever; ArtifactError if its syntax is not known.
    """
    try:
        part = Reader(pattern).whole()
    except (ValueError, IndexError) as error:
        raise ArtifactError(refused(pattern, where, str(error) or "it ends too early"), HINT) from None
    if part.ways > MAX_WAYS:
        why = "it can match a text in so many ways that matching may take forever"
        raise EndlessPatternError(refused(pattern, where, why), HINT)
    return part.shortest


def refused(pattern: str, where: str, why: str) -> str:
    """Return the message for a pattern that is not run."""
    return f"{where} has the regular expression `{pattern[:120]}`, which is not run: {why}"


class Reader:
    """A recursive-descent reader of one pattern."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_CHARS:
            raise ValueError(f"it has more than {MAX_CHARS} characters")
        self.text, self.at, self.depth = pattern, 0, 0

    def whole(self) -> Part:
        """Read all of it."""
        part = self.alternatives()
        if self.at < len(self.text):
            raise ValueError(f"the `)` at {self.at} closes nothing")
        return part

    def alternatives(self) -> Part:
        """Read branches between `|`: their ways add up."""
        branches = [self.sequence()]
        while self.takes("|"):
            branches.append(self.sequence())
        if len(branches) == 1:
            return branches[0]
        return Part(min(part.shortest for part in branches), sum(part.ways for part in branches), varies=True)

    def sequence(self) -> Part:
        """Read repeated parts in a row: their ways multiply."""
        shortest, ways, varies = 0, 1, False
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self.repeated()
            shortest, ways, varies = shortest + part.shortest, min(ways * part.ways, MANY), varies or part.varies
        return Part(shortest, ways, varies)

    def repeated(self) -> Part:
        """Read a part and its quantifier."""
        part = self.single()
        low, high = self.quantifier()
        while self.at < len(self.text) and self.text[self.at] in "?+*{" and low != high:
            # `a+?` is lazy and `a++` possessive, but `(a+)*` may also be written `a+*`.
            if not self.takes("?") and not self.takes("+"):
                raise ValueError(f"the quantifier at {self.at} follows another")
        if (low, high) == (1, 1):
            return part
        if low == high:
            return Part(low * part.shortest, min(part.ways**low if part.ways < MANY else MANY, MANY), part.varies)
        if high is None:
            if part.is_group and (part.varies or part.ways > 1 or part.shortest == 0):
                return Part(low * part.shortest, MANY, varies=True)
            return Part(low * part.shortest, UNBOUNDED_WAYS, varies=True)
        ways = sum(min(part.ways, MANY) ** n for n in range(low, high + 1)) if part.ways > 1 and high <= 64 else MANY
        return Part(low * part.shortest, min(high - low + 1 if part.ways == 1 else ways, MANY), varies=True)

    def quantifier(self) -> tuple[int, int | None]:
        """Read a quantifier, (1, 1) if there is none; a `{` without numbers is a character."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.takes(sign):
                return bounds
        end = self.text.find("}", self.at)
        if self.at < len(self.text) and self.text[self.at] == "{" and end > 0:
            low, comma, high = self.text[self.at + 1 : end].partition(",")
            if all(not part or (part.isascii() and part.isdecimal()) for part in (low, high)) and (low or high):
                self.at = end + 1
                least = int(low[:9] or 0)
                most = (int(high[:9]) if high else None) if comma else least
                if max(least, most or 0) > 1000 or (most is not None and most < least):
                    raise ValueError(f"it repeats a part {low or 0} to {high or low} times")
                return least, most
        return 1, 1

    def single(self) -> Part:
        """Read a character, an escape, a class or a group."""
        sign = self.text[self.at]
        if sign == "(":
            return self.group()
        if sign == "[":
            self.character_class()
            return Part(1, 1)
        if sign == "\\":
            return self.escape()
        self.at += 1
        if sign in "*+?":
            raise ValueError(f"the `{sign}` at {self.at - 1} repeats nothing")
        return Part(0 if sign in "^$" else 1, 1)

    def escape(self) -> Part:
        """Read a backslash and what follows."""
        sign = self.text[self.at + 1]
        self.at += 2
        if sign in "gkKR" or sign in "123456789":
            raise ValueError(f"it refers to a group or another pattern with `\\{sign}`")
        if sign in "pPxuUN" and self.takes("{"):
            self.at = self.text.index("}", self.at) + 1
        return Part(0 if sign in "bBAzZG" else 1, 1)

    def character_class(self) -> None:
        """Read `[...]`, which in Oniguruma can contain others."""
        self.at += 1
        self.takes("^")
        if self.takes("]"):
            pass
        self.deeper(1)
        while (sign := self.text[self.at]) != "]":
            if sign == "[":
                self.character_class()
            else:
                self.at += 2 if sign == "\\" else 1
        self.deeper(-1)
        self.at += 1

    def group(self) -> Part:
        """Read `(...)`; what looks around matches no characters."""
        self.at += 1
        looks = False
        if self.text.startswith("?", self.at):
            looks = self.text.startswith(("?=", "?!", "?<=", "?<!"), self.at)
            if kind := next((kind for kind in GROUPS if self.text.startswith(kind, self.at)), None):
                self.at += len(kind)
            elif not self.flags():
                self.name()
        elif self.text.startswith("*", self.at):
            raise ValueError("it calls a verb `(*`")
        if self.text[self.at - 1] == ")":  # flags for what follows, as in `(?i)`
            return Part(0, 1, is_group=True)
        self.deeper(1)
        part = self.alternatives()
        self.deeper(-1)
        if not self.takes(")"):
            raise ValueError("a `(` is not closed")
        return Part(0 if looks else part.shortest, part.ways, part.varies, is_group=True)

    def flags(self) -> bool:
        """Read `?i:` or `?i)`."""
        end = self.at + 1
        while end < len(self.text) and self.text[end] in "imsuaL-":
            end += 1
        if end == self.at + 1 or self.text[end] not in ":)":
            return False
        self.at = end + 1
        return True

    def name(self) -> None:
        """Read `?<name>` or `?P<name>`."""
        begin = next((kind for kind in ("?<", "?P<") if self.text.startswith(kind, self.at)), None)
        end = self.text.find(">", self.at)
        if begin is None or not self.text[self.at + len(begin) : end].isidentifier():
            raise ValueError(f"the group at {self.at - 1} is of no known kind")
        self.at = end + 1

    def takes(self, sign: str) -> bool:
        """Step over a character if it comes next."""
        found = self.text.startswith(sign, self.at)
        self.at += len(sign) if found else 0
        return found

    def deeper(self, step: int) -> None:
        """Count the nesting."""
        self.depth += step
        if self.depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
