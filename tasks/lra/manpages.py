"""Manpages: does one manual page refer to the other? Citation retrieval on data anyone can fetch.

Not an LRA task: it stands beside Retrieval, under its own name, and has no published figures.
Pages and their hand-written SEE ALSO links are those of the Linux man-pages and FreeBSD projects.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from flexbench.config import Preset, StackConfig, TrainingConfig
from flexbench.interface import ProblemSpec
from flexbench.tasks import trivial
from flexbench.tasks.archives import deb_members
from flexbench.tasks.arrays import Crop, Ragged, TokenSplit, to_ragged
from flexbench.tasks.base import Task, TaskData, registry
from flexbench.tasks.characters import END, PRINTABLE, SPECIAL, encode
from flexbench.tasks.store import DebianPackage, Raw, Resource, Source, Store

MANPAGES = Resource(
    name="manpages",
    task="manpages",
    sources=(
        Source(
            "debian",
            "package",
            (
                DebianPackage(
                    name="manpages_6.03-2_all.deb",
                    sha256="efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
                    size=1_331_652,
                    package="manpages",
                    version="6.03-2",
                ),
                DebianPackage(
                    name="manpages-dev_6.03-2_all.deb",
                    sha256="96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
                    size=2_030_264,
                    package="manpages-dev",
                    version="6.03-2",
                ),
                DebianPackage(
                    name="freebsd-manpages_12.2-1_all.deb",
                    sha256="2d4a9606bd59d4c71e6d8355dee3d2624b0ebdab79d3ab5e9169ed7fbb0c197a",
                    size=3_304_748,
                    package="freebsd-manpages",
                    version="12.2-1",
                ),
            ),
        ),
    ),
)
# Of the packages above; a page's references are to pages of its own project.
PROJECTS = {"linux": slice(0, 2), "freebsd": slice(2, 3)}

ALPHABET = np.concatenate([np.array([0x0A], dtype=np.uint32), PRINTABLE])
STORED_LENGTH = 4000
SHORTEST = 200
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
LARGEST_FAMILY = 10
TRAINING_DRAWS = 16
HASHES = 1024

Link = tuple[str, str]


@registry.register("manpages")
class Manpages(Task):
    """Does page A list page B under SEE ALSO? Two texts in, one of two classes out."""

    suite = "lra"
    version = 3
    summary = "SEE ALSO links among manual pages of Linux and of FreeBSD, two towers"
    chance = 0.5
    license = "Linux man-pages: free licences named in each page; FreeBSD: BSD licences"
    resources = (MANPAGES,)
    presets: ClassVar[dict[str, Preset]] = {
        "quick": Preset(
            l0=4,
            options={"tokens": "words", "max_length": 64},
            stack=StackConfig(d_model=64, n_layers=2, dropout=0.3),
            training=TrainingConfig(
                steps=600, batch_size=32, learning_rates=(1e-3,), weight_decay=0.05, evaluations=4
            ),
        ),
        "small": Preset(
            options={"max_length": 1024},
            stack=StackConfig(d_model=128, n_layers=4, dropout=0.1),
            training=TrainingConfig(steps=4000, batch_size=32, learning_rates=(1e-3, 2e-3, 4e-3)),
        ),
        "paper": Preset(
            stack=StackConfig(d_model=256, n_layers=6),
            training=TrainingConfig(
                steps=1980,
                batch_size=64,
                learning_rates=(1e-2,),
                ssm_learning_rate=1e-3,
                weight_decay=0.05,
                evaluations=20,
            ),
        ),
    }

    tokens: Literal["characters", "words"] = Field(
        "characters", description="words: of small letters, or of digits, hashed into 1,024 ids"
    )
    max_length: int = Field(
        STORED_LENGTH, ge=16, le=STORED_LENGTH, description="tokens, the end mark included"
    )
    crop: Crop = Field("head", description="which part of a longer page is kept")

    def prepare(self, store: Store) -> None:
        store.convert(self.name, self.version, {}, MANPAGES, _build)

    def load(self, store: Store) -> TaskData:
        prepared = store.load(self.name, self.version, {})
        pages = Ragged(prepared[self.tokens], prepared[f"{self.tokens}_offsets"])

        def split(name: str) -> TokenSplit:
            return TokenSplit(
                pages,
                prepared[f"{name}_labels"],
                prepared[f"{name}_pairs"],
                max_length=self.max_length,
                crop=self.crop,
                end=END,
            )

        spec = ProblemSpec(
            input="tokens",
            classes=2,
            max_length=self.max_length,
            vocab_size=SPECIAL + (HASHES if self.tokens == "words" else len(ALPHABET)),
            towers=2,
        )
        return TaskData(
            spec, split("train"), split("validation"), split("test"), source=prepared.source
        )

    def trivial_predictors(self, data: TaskData) -> dict[str, float]:
        token = self.tokens.removesuffix("s")
        return {
            "majority class": trivial.majority(data.train, data.test),
            f"linear on {token} counts": trivial.linear(data),
            f"cosine of {token} counts": trivial.cosine(data),
        }


def _build(folder: Path, raw: Raw) -> None:
    pages: dict[str, str] = {}
    links: set[Link] = set()
    for project, packages in PROJECTS.items():
        sources, aliases = read_pages(raw.paths[packages])
        for name in sorted(sources):
            if len(text := render(sources[name])) >= SHORTEST:
                pages[f"{project}/{name}"] = text
        links |= {
            (f"{project}/{first}", f"{project}/{second}")
            for first, second in find_links(sources, aliases)
        }
    links = {link for link in links if link[0] in pages and link[1] in pages}
    texts = [text[:STORED_LENGTH] for text in pages.values()]
    for kind, tokens in (
        ("characters", to_ragged([encode(text, ALPHABET) for text in texts])),
        ("words", to_ragged([hash_words(text) for text in texts])),
    ):
        np.save(folder / f"{kind}.npy", tokens.flat)
        np.save(folder / f"{kind}_offsets.npy", tokens.offsets)
    numbers = {name: number for number, name in enumerate(pages)}
    members = split_pages(list(pages), links)
    for seed, (split, names) in enumerate(members.items()):
        inside = sorted(link for link in links if link[0] in names and link[1] in names)
        generator = np.random.default_rng(seed)
        pairs: list[Link] = []
        labels: list[int] = []
        for _ in range(TRAINING_DRAWS if split == "train" else 1):
            positives, negatives = balance(inside, links, generator)
            pairs += [*positives, *negatives]
            labels += [1] * len(positives) + [0] * len(negatives)
        order = generator.permutation(len(pairs))
        numbered = np.array([[numbers[a], numbers[b]] for a, b in pairs], dtype=np.int64)
        np.save(folder / f"{split}_pairs.npy", numbered[order])
        np.save(folder / f"{split}_labels.npy", np.array(labels, dtype=np.uint8)[order])


def read_pages(packages: tuple[Path, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """The pages of Debian packages by name, as `open(2)`.

    Returns:
        roff sources by page, and the page that each alias stands for: a link or a `.so` request.
    """
    sources: dict[str, str] = {}
    aliases: dict[str, str] = {}
    layout = re.compile(r"(?:.*/)?([^/]+)\.(\d)\w*\.gz")
    request = re.compile(r"\s*\.so\s+(?:man\d/)?(\S+)\.(\d)\w*\s*")
    for package in packages:
        for path, content in deb_members(package):
            match = layout.fullmatch(path)
            if "/man/man" not in path or match is None:
                continue
            name = f"{match[1]}({match[2]})"
            if isinstance(content, str):
                target = layout.fullmatch(content)
            else:
                source = gzip.decompress(content).decode("utf-8", "replace")
                target = request.fullmatch(source)
                if target is None:
                    sources[name] = source
            if target is not None:
                aliases[name] = f"{target[1]}({target[2]})"
    return sources, aliases


def find_links(sources: dict[str, str], aliases: dict[str, str]) -> set[Link]:
    """Pairs (A, B) such that the SEE ALSO section of A names B, by whatever alias."""
    section = re.compile(r'^\.S[Hh] "?SEE ALSO"?\s*\n(.*?)(?=^\.S[Hh]|\Z)', re.M | re.S)
    reference = re.compile(r'^\.(?:BR\s+"?([^\s"]+)"?\s+\((\d)\w*\)|Xr\s+(\S+)\s+(\d))', re.M)
    links = set()
    for page, source in sources.items():
        found = section.search(source)
        for groups in reference.findall(found[1]) if found else ():
            name, number = filter(None, groups)
            target = f"{name.replace(chr(92), '')}({number})"
            for _ in range(3):
                target = aliases.get(target, target)
            if target in sources and target != page:
                links.add((page, target))
    return links


SILENT = re.compile(
    r"|[\\].*|TH|so|[LTI]?P|PP|TQ|R[SE]|E[XE]|T[SE&]|U[RE]|M[TE]|PD|nf|fi|in|ad|hy|nh|na|sp|ne|br|ta|"
    r"ti|ft|ss|ll|tm|ig|if|ie|el|de|ds|nr|rm|"
    r"D[dt]|Os|Pp|[BE][dfkl]|Lb|Xr|An|R[se]|%.|Sm|Fc"
)
# Macros named within a line of FreeBSD's mdoc, and references with their section.
MDOC = re.compile(r"\b(?:Xr \S+ \d\S*|[A-Z][a-z]|Br[qoc]|Bsx)(?=\s|$)")
UNSEEN_SECTIONS = frozenset({"NAME", "SEE ALSO", "COLOPHON", "AUTHORS"})
ESCAPES = [
    (re.compile(r'\\["#].*$'), ""),
    (re.compile(r"\\f(?:\[\w*\]|\(..|.)"), ""),
    (re.compile(r"\\s[+-]?\d+"), ""),
    (re.compile(r"\\(?:\[[^\]]*\]|\(..)"), " "),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[ ~]"), " "),
    (re.compile(r"\\e"), "\\\\"),
    (re.compile(r"\\."), ""),
]


def render(source: str) -> str:
    """Plain text of a page without what names it or its links: no comments (they hold authors and
    copyrights), title, NAME, SEE ALSO, AUTHORS or COLOPHON, and no reference of the form `name(2)`.
    """
    lines = []
    unseen = False
    for line in source.replace("\\\n", "").splitlines():
        request = re.match(r"[.']\s*(\S*)\s*(.*)", line)
        if request is not None:
            macro, rest = request.groups()
            if macro in ("SH", "Sh"):
                title = rest.strip().strip('"')
                unseen = title in UNSEEN_SECTIONS
                rest = title
            elif SILENT.fullmatch(macro):
                continue
            if re.fullmatch("[A-Z][a-z]+", macro):
                rest = MDOC.sub("", rest)
            words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest)]
            line = ("" if re.fullmatch("[BIR]{2}", macro) else " ").join(words)
        for pattern, replacement in ESCAPES:
            line = pattern.sub(replacement, line)
        if not unseen and line.strip():
            lines.append(line.strip())
    text = re.sub(r"[\w.+-]+ ?\(\d[a-z]?\)", "", "\n".join(lines))
    return re.sub(r"[ \t]+", " ", text)


def hash_words(text: str) -> np.ndarray:
    """Ids of the words of a text, by CRC-32: (words,) uint16."""
    words = re.findall(r"[a-z]+|[0-9]+", text.lower())
    return np.array([SPECIAL + zlib.crc32(word.encode()) % HASHES for word in words], np.uint16)


def split_pages(names: list[str], links: set[Link]) -> dict[str, set[str]]:
    """Every page to one split, families of pages together, so that few links are cut.

    Families are found by label propagation: again and again, in order, each page joins the family
    that most of its neighbours are in, while that has fewer than `LARGEST_FAMILY` members.
    """
    neighbours = defaultdict(list)
    for first, second in sorted(links):
        neighbours[first].append(second)
        neighbours[second].append(first)
    family = {name: name for name in names}
    sizes = Counter(names)
    for _ in range(30):
        moved = False
        for name in names:
            own = family[name]
            votes = Counter(family[other] for other in neighbours[name])
            open_to = [f for f in sorted(votes) if f == own or sizes[f] < LARGEST_FAMILY]
            best = max(open_to, key=lambda f: (votes[f], f == own), default=own)
            if best != own:
                sizes[own] -= 1
                sizes[best] += 1
                family[name] = best
                moved = True
        if not moved:
            break
    families = defaultdict(list)
    for name in names:
        families[family[name]].append(name)
    split_names = list(SHARES)
    cuts = np.cumsum(list(SHARES.values())) * len(names)
    members: dict[str, set[str]] = {split: set() for split in SHARES}
    placed = 0
    groups = [families[label] for label in sorted(families)]
    for index in np.random.default_rng(0).permutation(len(groups)):
        group = groups[index]
        which = min(int(np.searchsorted(cuts, placed, side="right")), len(SHARES) - 1)
        members[split_names[which]].update(group)
        placed += len(group)
    return members


def balance(
    inside: list[Link], links: set[Link], generator: np.random.Generator
) -> tuple[list[Link], list[Link]]:
    """As many pairs that are no link as links, made by exchanging targets among the links whose
    targets are of one section: either page alone, its length or its popularity, tells nothing.

    Args:
        inside: the links of one split; those for which no exchange is found are left out.
        links: all links; a pair that is one, in either direction, is no negative.
    """
    by_section = defaultdict(list)
    for link in inside:
        project, _, page = link[1].partition("/")
        by_section[project, page[-2]].append(link)
    positives: list[Link] = []
    negatives: list[Link] = []
    for section in sorted(by_section):
        origins, targets = (list(side) for side in zip(*by_section[section], strict=True))
        swapped = [targets[i] for i in generator.permutation(len(targets))]
        for _ in range(100):
            clashes = _clashes(origins, swapped, links)
            for index in clashes:
                other = int(generator.integers(len(swapped)))
                swapped[index], swapped[other] = swapped[other], swapped[index]
        refused = set(_clashes(origins, swapped, links))
        for index, origin in enumerate(origins):
            if index not in refused:
                positives.append((origin, targets[index]))
                negatives.append((origin, swapped[index]))
    return positives, negatives


def _clashes(origins: list[str], targets: list[str], links: set[Link]) -> list[int]:
    """Where (origin, target) is a link in either direction, one page twice, or a repetition."""
    taken: set[Link] = set()
    found = []
    for index, pair in enumerate(zip(origins, targets, strict=True)):
        if pair in links or pair[::-1] in links or pair[0] == pair[1] or pair in taken:
            found.append(index)
        taken.add(pair)
    return found
