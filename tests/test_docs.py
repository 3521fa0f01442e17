"""Every command of the run books is one that the program takes."""

from __future__ import annotations

import copy
import pathlib
import re
import shlex

import pytest
from absl import flags

from dyntoken import cluster, main

TEXT = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "runbooks.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"python -m (dyntoken[\w.]* [^\n\"]*)", "".join(BLOCKS).replace("\\\n", " "))
ADDRESS = "node0:8476"


def parse(words: list[str]) -> flags.FlagValues:
    """The flags of `dyntoken.main` after a command line, apart from those of this process."""
    from dyntoken.train import settings

    changes, argv = main.split_changes(words)
    values = flags.FlagValues()
    for flag in main.FLAGS.flags_by_module_dict()["dyntoken.main"]:
        values[flag.name] = copy.deepcopy(flag)
    assert values(argv) == [words[0]]
    settings.override(values.config, changes)
    return values


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    from dyntoken.train import plan

    module, *words = shlex.split(command)
    assert module == "dyntoken.main"
    given = parse([module, *words])
    assert given.workdir or given.dry_run
    settings = plan.read(given.config)
    assert settings.batch % settings.data.shards == 0
    if given.coordinator:
        found = cluster.find(
            given.distributed,
            coordinator=given.coordinator,
            processes=given.processes,
            process=given.process,
            environ={},
        )
        assert found == cluster.Cluster("flags", ADDRESS, 2, given.process)


def test_the_run_books_have_every_case():
    assert len(COMMANDS) == 12
    for title in (
        "One machine",
        "TPU pod",
        "Slurm",
        "Plain cluster",
        "Resume after",
        "A run of days",
        "Bring your own data",
    ):
        assert f"\n## {title}" in TEXT
    with pytest.raises(flags.Error, match="procesess"):
        parse(["dyntoken.main", "--config=configs/tps_deit.py", "--procesess=2"])
