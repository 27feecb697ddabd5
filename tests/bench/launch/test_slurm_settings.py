"""What jobs ask of Slurm: every key is submitit's, every mistake is one clear line."""

from __future__ import annotations

import pytest

from tsdfm_bench.errors import UsageError
from tsdfm_bench.launch.slurm_settings import (
    RESERVED,
    check_launcher,
    known_keys,
    minutes,
    parse_option,
    slurm_settings,
)


def test_every_key_is_a_parameter_of_the_installed_submitit() -> None:
    """And none of submitit's is forgotten: it may be set, is the launcher's own, or is obsolete."""
    from submitit.slurm.slurm import _get_default_parameters

    ours = {*known_keys(), *RESERVED} - {"extra"}
    assert ours - {"additional_parameters"} <= set(_get_default_parameters())
    assert set(_get_default_parameters()) - ours == {"additional_parameters", "num_gpus", "stderr_to_stdout"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("partition=main", {"partition": "main"}),
        ("partition=main,time=1:30:00,gpus-per-node=1", {"partition": "main", "time": "1:30:00", "gpus_per_node": "1"}),
        ("nodelist=a[1,3],b2, qos=high", {"nodelist": "a[1,3],b2", "qos": "high"}),
        ("constraint=a100|h100", {"constraint": "a100|h100"}),
        ("time=30,stages.ts-dfm.time=60", {"time": "30", "stages.ts-dfm.time": "60"}),
    ],
)
def test_the_option(text: str, found: dict[str, str]) -> None:
    """Commas separate pairs; inside a value they stay."""
    assert parse_option(text) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        (90, 90),
        ("1:30", 2),
        ("1:30:00", 90),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("0:1", 1),
        ("1-1:1:1", 1502),
    ],
)
def test_time_limits(text: object, expected: int) -> None:
    """Every form of sbatch's --time, rounded up to minutes."""
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "0", "0:00", "1.5", "-3", True])
def test_impossible_time_limits(text: object) -> None:
    """They are errors before anything is submitted."""
    with pytest.raises(UsageError, match="time"):
        minutes(text)


def test_overrides_by_method_and_scorer() -> None:
    """A method's own parameters replace the common ones, for its jobs alone."""
    settings = slurm_settings(
        {
            "partition": "gpu",
            "time": 30,
            "methods": {"ar": {"time": "2:00:00", "constraint": "a100"}},
            "scorers": {"hf:gpt2": {"gpus-per-node": 2}},
        }
    )
    assert settings.of("methods", "mdlm") == {"partition": "gpu", "time": 30}
    assert settings.of("methods", "ar") == {"partition": "gpu", "time": 120, "constraint": "a100"}
    assert settings.of("scorers", "hf:gpt2") == {"partition": "gpu", "time": 30, "gpus_per_node": 2}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"partiton": "x"}, "did you mean 'partition'"),
        ({"methods": {"ar": {"tim": 3}}}, "'methods.ar: tim'; did you mean 'time'"),
        ({"dependency": "afterok:1"}, "launcher's own"),
        ({"use_srun": "false"}, "signal"),
        ({"ntasks_per_node": 2}, "one process on each node"),
        ({"nodes": 0}, "at least 1"),
        ({"stages.ts-dfm.tim": "3"}, "'stages.ts-dfm: tim'; did you mean 'time'"),
        ({"stages.ts-dfm": "3"}, "unknown key 'stages.ts_dfm'"),
        ({"gpus_per_node": "many"}, "not a whole number"),
        ({"cpus_per_task": 0}, "at least 1"),
        ({"poll": "0"}, "at least 0.1"),
        ({"methods": "ar"}, "table of tables"),
        ({"detach": "maybe"}, "true or false"),
    ],
)
def test_mistakes(table: dict[str, object], said: str) -> None:
    """Each names the key and what is possible."""
    with pytest.raises(UsageError, match="slurm: ") as error:
        slurm_settings(table)
    assert said in str(error.value)


def test_without_an_equals_sign() -> None:
    """The message shows how it is written."""
    with pytest.raises(UsageError, match=r"partition=main,time=30; 'main' is none"):
        parse_option("main")


def test_options_that_nobody_would_heed() -> None:
    """Jobs' parameters without jobs are a mistake, not a wish."""
    check_launcher("slurm")
    for name in (None, "local"):
        with pytest.raises(UsageError, match="belong to --launcher slurm"):
            check_launcher(name)


def test_one_method_from_the_command_line() -> None:
    """What is typed changes what the table says, for one method, scorer or stage alone."""
    table = {"time": 30, "methods": {"ar": {"time": 60, "constraint": "a100"}}}
    settings = slurm_settings({**table, **parse_option("methods.ar.time=2:00:00,scorers.hf:a/b-1.5.mem=40G")})
    assert settings.of("methods", "ar") == {"time": 120, "constraint": "a100"}
    assert settings.of("scorers", "hf:a/b-1.5") == {"time": 30, "mem": "40G"}
    assert settings.of("methods", "mdlm") == {"time": 30}


@pytest.mark.parametrize("table", [{"nodes": 3}, {"nodes": 2, "methods.ar.nodes": 3}, {"scorers.smollm2.nodes": 3}])
def test_nodes_are_for_trainings(table: dict[str, object]) -> None:
    """A job of a sweep could not use a second node."""
    with pytest.raises(UsageError, match="nodes = 3 is for trainings"):
        slurm_settings(table).check_sweep()
    slurm_settings({"nodes": 1, "stages.tsdfm.nodes": 3}).check_sweep()
