"""Every number of an equation, table, figure or section that code and docs give is the paper's own."""
import re
from pathlib import Path

import pytest

import grpo
import train

ROOT = Path(__file__).resolve().parent.parent

# the paper's formulas -> words of which one must stand near each mention of them
FORMULAS = {
    "Eq. 1": "x_t|forward|Flow|flow",
    "Eq. 2": "loss|flow|mse|minimise|objective",
    "Eq. 3": "SDE|sde|sigma|reverse",
    "Eq. 4": "LN|c_i|c_1|LIM|norm|fuse|condition",
    "Eq. 5": "mean|sum|average|fuse|condition",
    "Eq. 6": "gamma|perturb|Perturb|Integration",
    "Algorithm 1": "LDAM|ldam|g_n|r_n|line|literal|jumped",
    **{f"supplement Eq. {n}": "gamma" for n in range(1, 6)}}
# what else it has that is spoken of
OTHERS = {*(f"{kind} {n}" for n in (1, 2, 3) for kind in ("Table", "supplement Table", "supplement Figure")),
          *(f"Figure {n}" for n in (2, 3, 4, 5, 6, 9, 10)),
          *(f"section {n}" for n in ("1", "3.1", "3.2", "3.3", "4.1")),
          *(f"supplement section {n}" for n in (3, 4))}
MENTION = re.compile(r"(?P<supplement>[Ss]upplement(?:'s)?,?\s+(?:of the paper,?\s+)?|\bS )?"
                     r"\b(?P<kind>Eqs?\.|Tables?|Figures?|Fig\.|Algorithm|[Ss]ections?) ?"
                     r"(?P<numbers>\d+(?:\.\d+)?(?:(?:, | and | to |-|–|, and )\d+(?:\.\d+)?)*)")
KINDS = {"Eq": "Eq.", "Ta": "Table", "Fi": "Figure", "Al": "Algorithm", "se": "section", "Se": "section"}


def numbers_of(text: str) -> list[str]:
    """"4, 5" -> 4, 5; "1-3" and "1 to 3" -> 1, 2, 3."""
    found = []
    for part in re.split(r", and |, | and ", text):
        ends = re.split(r"-|–| to ", part)
        if len(ends) == 2 and "." not in part:
            ends = [str(n) for n in range(int(ends[0]), int(ends[1]) + 1)]
        found += ends
    return found


def mentions(path: Path) -> list[tuple[str, str]]:
    """(what, the text around it) of every number in a file that is said to be the paper's."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in MENTION.finditer(text):
        before = text[max(0, match.start() - 24):match.start()]
        # formulas of other papers carry the paper's name or its arXiv number
        if re.search(r"(\d{4}\.\d{5}|Flow-GRPO|SANA|readings\S*|GenEval's|DESIGN)[,)]? $", before):
            continue
        where = "supplement " if match["supplement"] else ""
        around = text[max(0, match.start() - 300):match.end() + 300]
        found += [(f"{where}{KINDS[match['kind'][:2]]} {number}", around)
                  for number in numbers_of(match["numbers"])]
    return found


FILES = [path for pattern in ("*.py", "evaluation/*.py", "tools/*.py", "nano/*.py", "*.md", "docs/*.md")
         for path in sorted(ROOT.glob(pattern)) if path.name != "forks.md"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_that_is_given_is_the_papers_and_stands_where_it_belongs(path: Path) -> None:
    for what, around in mentions(path):
        assert what in OTHERS or re.search(FORMULAS[what], around), what


def test_the_mentions_are_found_at_all() -> None:
    found = {what for path in FILES for what, _ in mentions(path)}
    assert {"Eq. 1", "Eq. 3", "Eq. 6", "Algorithm 1", "supplement Table 1", "supplement Eq. 5"} <= found


@pytest.mark.parametrize("stage, lr, batch, steps, warmup", [
    (1, 1e-4, 512, 100_000, 1_000), (2, 1e-5, 512, 10_000, 100), (3, 1e-4, 8, (2_000,), 0)])
def test_supplement_table_1_cell_by_cell(stage: int, lr: float, batch: int, steps: int | tuple, warmup: int,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (train, grpo):
        monkeypatch.setattr(module, "train", lambda cfg, dist: cfg)
    cfg = train.main(["--stage", str(stage), "--preset", "l-1024"])
    assert (cfg.lr, cfg.steps, cfg.warmup, cfg.weight_decay) == (lr, steps, warmup, 0.05)
    if stage == 3:
        # a reading: the paper's 9 is the pictures of a forward pass, and does not divide a group of 24
        assert cfg.micro_batch == batch and cfg.rewards == ("aesthetic", "pickscore", "clip")
    else:
        assert cfg.batch_size == batch
