"""What README and docs/ show works as it is written: every python block runs, every command parses, messages exist.

The commands of how-tos, and README's, are also run, on a thin model and small pictures: `pytest -m slow`.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image
from safetensors.numpy import save_file

import dyntoken
from dyntoken import config as recipes
from dyntoken import main, multihost
from dyntoken.eval.runner import Runner
from dyntoken.reducers import METHODS
from dyntoken.train import settings as train_settings
from tests.train.tiny import tiny_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADDRESS = "node0:8476"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
THIN = {"width": 16, "heads": 2}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: of which file and `##` section, in which language."""

    file: str
    section: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.section}"


def _blocks(path):
    for part in re.split(r"^## ", path.read_text(), flags=re.M):
        for language, text in FENCE.findall(part):
            yield Block(path.name, part.partition("\n")[0].strip("# "), language, text)


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = [block for path in PAGES for block in _blocks(path)]
GUIDES = ("adding_a_method.md", "adding_a_backbone.md", "adding_data.md")  # they register rows: tests/plugins
PYTHON = [block for block in BLOCKS if block.language == "python" and block.file not in GUIDES]
SECTIONS = list(dict.fromkeys(map(str, PYTHON)))
SECTIONS.remove("features.md: Ray")  # tests/test_ray.py
LONG = ("howto.md: A notebook",)  # whole runs
# A command of ours, to the end of its line or to a shell operator; a continued line is one.
SHELL = "\n".join(block.text for block in BLOCKS if block.language == "bash").replace("\\\n", " ")
COMMANDS = sorted(set(re.findall(r"python -m (dyntoken[\w.]*(?: [^\n\"&|]*)?)", SHELL)))
# `dyntoken NAME ...` is the same program.
OF_MAIN = {"train": "", "eval": " --mode=eval"}
COMMANDS += [
    f"dyntoken.main{words}{OF_MAIN[name]}" if name in OF_MAIN else f"dyntoken.tools.{name}{words}"
    for name, words in sorted(set(re.findall(r"^dyntoken (\w+)( [^\n\"&|]*)", SHELL, re.M)))
]
COMMANDS = [command for command in COMMANDS if "plugins=my_" not in command]
SCRIPTS = sorted(set(re.findall(r"python scripts/(\w+)\.py ([^\n\"&|]*)", SHELL)))


def test_every_block_is_of_a_language_that_is_tested():
    assert {block.language for block in BLOCKS} == {"", "bash", "python"}  # "" is what a command printed
    assert len(SECTIONS) >= 2 and len(COMMANDS) >= 25
    known = re.compile(
        r"\s*(srun|gcloud|pip (install|wheel)|dyntoken \w+ |python (-m (dyntoken|pytest|tests.golden)|scripts/)|#|$)"
    )
    lines = [line for line in SHELL.splitlines() if not known.match(line)]
    assert not lines, "nothing tests these"


def run_section(section):
    """The python blocks of a section in order, in one namespace."""
    scope = {"__name__": "documentation"}
    for block in BLOCKS:
        if block.language == "python" and str(block) == section:
            exec(compile(block.text, section, "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The workdir of one step."""
    from dyntoken import train

    workdir = tmp_path_factory.mktemp("trained") / "mine"
    train.run(tiny_config(steps=1), workdir, log=lambda line: None)
    return workdir


@pytest.fixture
def at_home(a_run, tmp_path, monkeypatch):
    """A folder with what the blocks take for granted: a run, a photograph, a checkpoint of Hugging Face's layout."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(a_run, "runs/mine")
    Image.new("RGB", (40, 30), (200, 90, 30)).save("cat.jpg")
    made_dinov2(tmp_path / "dinov2_small")


def made_dinov2(folder, width=24, depth=4, grid=5):
    """A checkpoint as transformers saves a `Dinov2Model`, with random values."""
    rng, arrays = np.random.default_rng(0), {}

    def put(name, *shape):
        arrays[name] = rng.normal(scale=0.05, size=shape).astype(np.float32)

    put("embeddings.cls_token", 1, 1, width)
    put("embeddings.mask_token", 1, width)
    put("embeddings.position_embeddings", 1, 1 + grid * grid, width)
    put("embeddings.patch_embeddings.projection.weight", width, 3, 14, 14)
    put("embeddings.patch_embeddings.projection.bias", width)
    layers = {"attention.attention.query": 1, "attention.attention.key": 1, "attention.attention.value": 1}
    layers |= {"attention.output.dense": 1, "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(depth):
        stem = f"encoder.layer.{block}"
        for name, factors in layers.items():
            rows, columns = (factors, factors) if factors == 1 else factors
            put(f"{stem}.{name}.weight", rows * width, columns * width)
            put(f"{stem}.{name}.bias", rows * width)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            put(f"{stem}.{name}", width)
        for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            put(f"{stem}.{name}", width)
    put("layernorm.weight", width)
    put("layernorm.bias", width)
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 2, "mlp_ratio": 4}
    config = {
        "model_type": "dinov2",
        "image_size": 14 * grid,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "section",
    [
        section if section.startswith("README") else pytest.param(section, marks=pytest.mark.thorough)
        for section in SECTIONS
        if section not in LONG
    ],
)
def test_python_blocks_run(section, at_home, monkeypatch):
    real = dyntoken.create_model

    def thin(name, **given):
        """The model that is asked for, of few channels; a cascade also of few blocks."""
        few = {**THIN, **({"depth": 1} if name.startswith("dvt") else {})}
        return real(name, **(given if "mini" in name or "width" in given else {**few, **given}))

    monkeypatch.setattr(dyntoken, "create_model", thin, raising=False)
    monkeypatch.setattr(Runner, "precompile", lambda runner: 0)  # 17 programs, of which the call needs a few
    check(section, run_section(section))


@pytest.mark.slow  # minutes: DeiT-S at 224 pixels, and all 17 programs of a cascade's runner
@pytest.mark.parametrize("section", SECTIONS)
def test_python_blocks_run_at_full_size(section, at_home):
    check(section, run_section(section))


def check(section, scope):
    """What the comments beside the code say."""
    if section == "README.md: Your ViT, fewer tokens, in five lines":
        assert scope["features"].pooled.shape == (1, 24) and scope["model"].method == "etps"
        assert scope["features"].tokens.count == 89  # of 256: 180, 126 and 89 stay
        assert dyntoken.unreduce(scope["features"]).shape == (1, 16, 16, 24)
    if section in ("README.md: Use it", "tutorial.md: A model"):
        assert scope["out"].logits.shape == (8, 1000)
        assert scope["out"].reductions[0].keep.shape == (8, 137)
        assert scope["out"].reductions[-1].carrier.shape == (8, 196)
    if section == "tutorial.md: Exits":
        assert scope["found"].logits.shape == (8, 1000) and scope["found"].exit.shape == (8,)
    if section == "tutorial.md: Weights":
        assert pathlib.Path("dtps.safetensors").exists() and "params" in scope["variables"]
    if section == "export.md: Run it elsewhere":
        ours = dyntoken.load_export("deit").preprocess(np.asarray(Image.open("cat.jpg").convert("RGB")))
        found = (scope["images"][0] / 255 - scope["how"]["mean"]) / scope["how"]["std"]
        np.testing.assert_allclose(found, ours, atol=2.5 / 255 / 0.22)
    if section == "howto.md: A notebook":
        assert {"loss", "top1"} <= set(scope["result"].metrics)
    if section == "equations.md: DynamicViT: which patches stay":
        assert scope["decision"].tolist() == [[1.0, 0.0]]
        np.testing.assert_allclose(scope["shares"][0, 0, 0], (0.5, 0.5, 0.0), atol=1e-5)
        np.testing.assert_allclose(scope["shares"][0, 0, 2], (1 / 3, 1 / 3, 1 / 3), atol=1e-5)
    if section == "equations.md: TPS: matching and squeezing":
        assert scope["fused"].host.tolist() == [[0]]
        np.testing.assert_allclose(scope["fused"].x[0], ((1.5, 0.0), (0.0, 1.0)), rtol=1e-5)


def parse(words: list[str]) -> flags.FlagValues:
    """The flags of `dyntoken.main` after a command line, apart from those of this process."""
    from dyntoken.train import settings

    changes, argv = main.split_changes(words)
    values = flags.FlagValues()
    for flag in main.FLAGS.flags_by_module_dict()["dyntoken.main"]:
        values[flag.name] = copy.deepcopy(flag)
    assert values(argv) == [words[0]]
    if values.config is None:  # an evaluation by the config that the run keeps
        assert values.mode == "eval" and values.workdir and not changes
    else:
        settings.override(values.config, changes)
    return values


class Parsed(Exception):
    """A tool's options were read."""


@pytest.fixture
def only_parse(monkeypatch):
    """Programs raise `Parsed` where they would begin their work."""
    for method in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, method)

        def only(self, *args, real=real, **more):
            raise Parsed(real(self, *args, **more))

        monkeypatch.setattr(argparse.ArgumentParser, method, only)


@pytest.mark.parametrize("script, words", SCRIPTS)
def test_a_script_parses(script, words, only_parse):
    with pytest.raises(Parsed):
        importlib.import_module(f"scripts.{script}").main(shlex.split(words, comments=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command, only_parse):
    module, *words = shlex.split(command, comments=True)
    if module != "dyntoken.main":
        program = importlib.import_module(module)
        with pytest.raises(Parsed) as read:
            program.main(words)
        names = vars(read.value.args[0])
        others = names.get("vs") or []
        for name in {names.get("name"), *([others] if isinstance(others, str) else others)} - {None}:
            # A run's workdir stands for its model, and a method alone takes that of the weights.
            of_weights = name.partition(":")[0] in METHODS
            if not (names.get("workdir") or name.startswith("runs/") or of_weights):
                dyntoken.create_model(name)
        if names.get("config"):
            recipes.load(names["config"])
        return
    given = parse([module, *words])
    if given.config is None:
        return
    settings = train_settings.read(given.config)
    assert settings.batch % settings.data.shards == 0
    if given.coordinator:
        found = multihost.detect(
            given.distributed,
            coordinator=given.coordinator,
            processes=given.processes,
            process=given.process,
            environ={},
        )
        assert found == multihost.Cluster("flags", ADDRESS, 2, given.process)


def test_a_cheap_command_runs(capsys):
    command = next(c for c in COMMANDS if c.startswith("dyntoken.tools.flops") and "--keep=0.7" in c)
    module, *words = shlex.split(command, comments=True)
    assert importlib.import_module(module).main(words) == 0
    assert "2.99" in capsys.readouterr().out


def commands_of(*files):
    """The commands of these files, in order, of ours alone, without those that need what only a user has."""
    lines = "\n".join(b.text for b in BLOCKS if b.language == "bash" and b.file in files).replace("\\\n", " ")
    found = re.findall(r"python -m (dyntoken[\w.]*(?: [^\n\"&|]*)?)", lines)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.slow
def test_an_installed_copy_is_tried_out(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "check_install.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "exits: (2, 2, 1000)" in done.stdout, done.stderr


@pytest.mark.slow  # a dozen runs
@pytest.mark.parametrize("file", ["howto.md", "README.md"])
def test_commands_run_on_a_folder_of_pictures(file, tmp_path, monkeypatch):
    """As they stand, but for the model's size, the pictures' and the length of the run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.png")
    Image.new("RGB", (64, 48), (200, 90, 30)).save("cat.jpg")
    thin = {"width": 16, "heads": 2, "depth": 4}
    dense = dyntoken.create_model("deit_tiny_patch16_224", **thin)
    start = dense.init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    made_dinov2(tmp_path / "dinov2_small", width=16)
    pathlib.Path("weights").mkdir()
    dyntoken.save_weights("weights/deit_tiny_patch16_224.safetensors", start, model=dense)
    ran = 0
    for module, *words in commands_of(file):
        if any(word.endswith((":demo", ".pth")) or "hf:" in word for word in words) or {
            "dinov2_small",
            "--source=dinov2_small",
        } & {*words}:
            continue  # tests/test_demos.py, tests/tools
        if module == "dyntoken.main":
            given = parse([module, *words])
            config = main.stored_config(given.workdir) if given.config is None else given.config
            with config.unlocked():
                config.model.update(thin)
                if config.teacher.name:
                    config.teacher.update(thin)
                if config.data.size == 224:
                    config.data.size = 64
                config.update({"batch": 16, "epochs": 1.0, "curves": False})
                config.optim.warmup_epochs = 0
            assert main.run(config, given.workdir, given.mode, given.dry_run, given.step) == 0
        else:
            assert importlib.import_module(module).main(words) == 0, (module, words)
        ran += 1
    assert ran >= 4
    if file == "howto.md":
        assert dyntoken.load_run("runs/mine160").preprocess.size == (160, 160)
        assert list(pathlib.Path("runs/watched/tensorboard").iterdir())
        assert dyntoken.load_pretrained("mine.safetensors")[0].num_classes == 2


LINK = re.compile(r"\]\(([\w./-]+)(?:#([\w-]+))?\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link, anchor in LINK.findall(path.read_text()):
        target = path.parent / link
        assert target.exists(), f"{path.name}: {link}"
        heads = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        names = {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}
        assert not anchor or anchor in names, f"{path.name}: {link}#{anchor}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_message_that_is_explained_is_in_the_code():
    """`...` stands for what is filled in."""
    known = []
    for path in (ROOT / "dyntoken").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                known.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.append(node.value)
    messages = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    text = "\n".join(known)
    assert len(messages) >= 20
    assert not [message for message in messages if message not in text]


def test_functions_beside_equations_exist():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs" / "equations.md").read_text())
    assert len(named) >= 20
    for file, name in named:
        found = importlib.import_module(f"dyntoken.{file.removesuffix('.py').replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)


def test_the_site_has_every_page():
    """None twice (what the menu forgets, the hook adds). What the API page shows exists."""
    nav = re.findall(r"\w+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert len(nav) == len(set(nav)) and len(nav) > 25
    shown = re.findall(r"^::: (.*)\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert len(shown) >= 30
    for module, name in shown:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_run_books_have_every_case():
    text = (ROOT / "docs" / "runbooks.md").read_text()
    for title in (
        "One machine",
        "TPU pod",
        "Slurm",
        "Plain cluster",
        "Resume after",
        "A run of days",
        "Bring your own data",
    ):
        assert f"\n## {title}" in text
    with pytest.raises(flags.Error, match="procesess"):
        parse(["dyntoken.main", "--config=configs/tps_deit.py", "--procesess=2"])
