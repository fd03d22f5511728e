"""The direction of imports, and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mechunlearn"
ORDER = (
    (
        "registry",
        "facts",
        "files",
        "splits",
        "html_card",
        "rankings",
        "components",
        "statistics",
        "power",
        "recovery",
        "comparison",
        "evidence",
        "rounding",
        "resumable",
        "saved_records",
        "denormals",
    ),
    ("architectures",),
    ("models", "bridge"),
    ("prompts", "activations", "codebook"),
    ("codebook_model",),
    ("checkpoints",),
    ("encoder_decoder",),
    ("metrics", "probes"),
    ("sources", "localize"),
    ("entries",),
    ("masks", "matrix_patterns"),
    ("selection", "random_masks"),
    ("edit",),
    ("changes", "features"),
    ("evaluate", "attack", "verdict"),
    ("controls",),
    ("settings", "runs"),
    ("cells",),
    ("judging",),
    ("experiment",),
    ("bench",),
    ("study",),
    ("report",),
    ("exploration",),
    ("explorer",),
    ("stages", "study_stage", "features_stage", "guards_stage"),
    ("cli_console",),
    ("cli_organism", "cli_bench", "cli_study", "cli_features"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# The organisms are data made by code: text and tokenizer come before everything that is measured on them.
ORGANISM_TEXT = {"neutral", "people", "corpus", "forget_sets", "tokenizer", "train", "muon", "descriptions"}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name for name in names if name.startswith("mechunlearn.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    home = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if home in ("organisms", "__init__"):
        return
    for name in _imports(path):
        target = name.split(".")[1]
        if target == "organisms" and home in ("cli", "stages", "features_stage", "guards_stage"):
            continue
        if target == "organisms":
            assert name.split(".")[2] in ORGANISM_TEXT, f"{home} imports {name}"
        else:
            assert LEVEL[target] <= LEVEL[home], f"{home} imports {name}, which comes after it"


def test_every_module_has_a_place_in_the_order():
    modules = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if not p.name.startswith(("_", "."))}
    assert modules - {"py", "organisms", "presets", "datasets"} <= set(LEVEL)


@pytest.mark.parametrize(
    "statement",
    [
        "import mechunlearn; dir(mechunlearn)",
        "from mechunlearn import Fact, split_facts, Component, Verdict",
        "from mechunlearn.cli import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
)  # fmt: skip
def test_a_light_start_does_not_import_torch(statement):
    code = f"{statement}\nimport sys; assert 'torch' not in sys.modules and 'transformer_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_can_be_imported():
    import mechunlearn

    for name in mechunlearn.__all__:
        assert getattr(mechunlearn, name) is not None


def test_datasets_is_no_python_package():
    assert not list((PACKAGE.parent / "datasets").rglob("*.py")), "it would shadow the Hugging Face package"
