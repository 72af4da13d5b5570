"""Configs: what is accepted, and that every mistake is named with its place."""

import textwrap
from contextlib import suppress
from typing import get_args

import numpy as np
import pytest
from pydantic import BaseModel

from dmrl_ray.config.components import SHORT_NAMES, did_you_mean
from dmrl_ray.config.loading import expanded, load_config, parse_config, resolved
from dmrl_ray.config.schema import Component, Count, RunConfig, Settings
from dmrl_ray.config.yaml_text import dump, parse
from dmrl_ray.errors import ConfigError


class Tasks:
    class Config(Settings):
        goals: int = 3
        radius: float = 0.5


class Encoder:
    class Config(Settings):
        hidden: tuple[int, ...] = (64, 64)
        hidden_size: int = 64


class Network:
    class Config(Settings):
        encoder: Component = Component(type=f"{__name__}:Encoder")
        value_head: bool = True


class Algorithm:
    class Config(Settings):
        inner_lr: float = 0.1
        steps: Count = 10


class NoConfig:
    pass


GOOD = f"""\
name: fine
tasks:
  type: {__name__}:Tasks
  goals: 5
network:
  type: {__name__}:Network
  encoder:
    type: {__name__}:Encoder
    hidden: [32]
algorithm:
  type: {__name__}:Algorithm
  inner_lr: 1e-3
stages:
  meta:
    type: pretrain
    env_steps: 1e4
  tune:
    type: finetune
    init_from: meta
    trainable: [policy_head]
    algorithm:
      type: {__name__}:Algorithm
      steps: 2k
"""


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, f"{old!r} must occur once"
    return GOOD.replace(old, new)


def errors(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "run.yaml", overrides)
    return str(caught.value)


def test_a_good_config_is_read():
    config = parse_config(GOOD, "run.yaml")
    assert config.tasks.settings == Tasks.Config(goals=5)
    assert config.algorithm.settings.inner_lr == 0.001
    assert config.network.settings.encoder.settings.hidden == (32,)
    assert config.stages["meta"].env_steps == 10_000
    assert config.stages["tune"].algorithm.settings.steps == 2000
    assert list(config.stages) == ["meta", "tune"]


def test_the_resolved_config_reads_back_to_an_equal_one():
    config = parse_config(GOOD, "run.yaml")
    text = resolved(config)
    assert parse_config(text, "resolved") == config
    assert resolved(parse_config(text, "resolved")) == text


def test_the_resolved_config_holds_every_default():
    data = parse("x", resolved(parse_config(GOOD, "run.yaml"))).data
    assert data["tasks"] == {"type": f"{__name__}:Tasks", "goals": 5, "radius": 0.5}
    assert data["commit"]["keep"] == 3
    assert data["network"]["value_head"] is True


def test_a_config_made_in_python_resolves_as_one_read_from_yaml():
    read = parse_config(GOOD, "run.yaml")
    made = read.model_copy(update={"tasks": Component(type=f"{__name__}:Tasks", goals=5)})
    assert made != read
    assert expanded(made) == read


# Each: the edit, the first line of the message, and the column under which the caret stands.
CORPUS = {
    "unknown top level key": (
        ("name: fine", "nmae: fine"),
        "run.yaml:1:1: nmae: unknown setting; did you mean 'name'?",
    ),
    "unknown key of a component": (
        ("inner_lr: 1e-3", "iner_lr: 0.1"),
        "run.yaml:12:3: algorithm.iner_lr: unknown setting; did you mean 'inner_lr'?",
    ),
    "a setting by its old name": (
        ("hidden: [32]", "size: 32"),
        "run.yaml:9:5: network.encoder.size: this setting was renamed to hidden_size",
    ),
    "a deadline of calls, which there is no more": (
        ("name: fine", "workers: {deadline_s: 60}"),
        "run.yaml:1:11: workers.deadline_s: this setting is gone: a worker or learner is lost when "
        "its process is dead, stopped or blocked, however long a call takes; "
        "environments.timeout_s ends the calls of environments that take longer",
    ),
    "a setting of another type": (
        ("inner_lr: 1e-3", "belief_steps: 1"),
        "run.yaml:12:3: algorithm.belief_steps: this setting belongs to another type: "
        "stepwise_pearl",
    ),
    "unknown key of a nested component": (
        ("hidden: [32]", "hiden: [32]"),
        "run.yaml:9:5: network.encoder.hiden: unknown setting; did you mean 'hidden'?",
    ),
    "unknown key of a stage's component": (
        ("steps: 2k", "stepps: 2k"),
        "run.yaml:23:7: stages.tune.algorithm.stepps: unknown setting; did you mean 'steps'?",
    ),
    "unknown key of a stage": (
        ("    env_steps: 1e4", "    env_steps: 1e4\n    validate_evry: 3"),
        "run.yaml:17:5: stages.meta.validate_evry: unknown setting; did you mean 'validate_every'?",
    ),
    "unknown key that is like none": (
        ("goals: 5", "zzzzzz: 5"),
        "run.yaml:4:3: tasks.zzzzzz: unknown setting; allowed here: goals, radius",
    ),
    "text for a number": (
        ("env_steps: 1e4", "env_steps: many"),
        "run.yaml:16:5: stages.meta.env_steps: must be a whole number, found 'many'",
    ),
    "fraction for a whole number": (
        ("env_steps: 1e4", "env_steps: 1.5"),
        "run.yaml:16:5: stages.meta.env_steps: must be a whole number, found 1.5",
    ),
    "switch for a number": (
        ("goals: 5", "goals: true"),
        "run.yaml:4:3: tasks.goals: must be a number, found 'true'",
    ),
    "section for a number": (
        ("goals: 5", "goals: {a: 1}"),
        "run.yaml:4:3: tasks.goals: must be a whole number, found a section",
    ),
    "nothing for a number": (
        ("goals: 5", "goals:"),
        "run.yaml:4:3: tasks.goals: must be a whole number, found nothing",
    ),
    "not a number": (
        ("inner_lr: 1e-3", "inner_lr: .nan"),
        "run.yaml:12:3: algorithm.inner_lr: must be a finite number, found nan",
    ),
    "out of range": (
        ("env_steps: 1e4", "env_steps: 0"),
        "run.yaml:16:5: stages.meta.env_steps: must be at least 1, found 0",
    ),
    "item of a list": (
        ("hidden: [32]", "hidden: [32, big]"),
        "run.yaml:9:18: network.encoder.hidden.1: must be a whole number, found 'big'",
    ),
    "bad choice": (
        ("init_from: meta", "init_from: meta\n    checkpoint: bets"),
        "run.yaml:20:5: stages.tune.checkpoint: found 'bets'; did you mean 'best'?",
    ),
    "unknown stage type": (
        ("type: pretrain", "type: pretrian"),
        "run.yaml:15:5: stages.meta.type: unknown type 'pretrian'; did you mean 'pretrain'?",
    ),
    "stage without type": (
        ("    type: pretrain\n", ""),
        "run.yaml:14:3: stages.meta: 'type' is required: one of pretrain, finetune, adapt, "
        "evaluate",
    ),
    "missing setting": (
        ("    init_from: meta\n", ""),
        "run.yaml:17:3: stages.tune.init_from: this setting is required: "
        "Name of the stage whose policy is fine-tuned.",
    ),
    "unknown short name": (
        (f"type: {__name__}:Tasks", "type: bandti"),
        "run.yaml:3:3: tasks.type: unknown type 'bandti'; did you mean 'bandit'?",
    ),
    "short name of another setting": (
        (f"type: {__name__}:Tasks", "type: ppo"),
        "run.yaml:3:3: tasks.type: 'ppo' is a choice for 'algorithm', not here; choose one of "
        f"{', '.join(SHORT_NAMES['tasks'])} or give an import path 'module:Class'",
    ),
    "missing module": (
        (f"type: {__name__}:Tasks", "type: no_such_module.x:Y"),
        "run.yaml:3:3: tasks.type: there is no module 'no_such_module.x'; is its folder the "
        "working directory, or is it installed?",
    ),
    "missing class": (
        (f"type: {__name__}:Tasks", f"type: {__name__}:Taks"),
        f"run.yaml:3:3: tasks.type: module '{__name__}' has no class 'Taks'; did you mean 'Tasks'?",
    ),
    "class without settings": (
        (f"type: {__name__}:Tasks", f"type: {__name__}:NoConfig"),
        f"run.yaml:3:3: tasks.type: class '{__name__}:NoConfig' has no settings: nest a "
        "class Config(dmrl_ray.config.Settings) in it",
    ),
    "no stage of that name": (
        ("init_from: meta", "init_from: mteta"),
        "run.yaml:19:5: stages.tune.init_from: there is no earlier stage 'mteta'; "
        "did you mean 'meta'?",
    ),
    "stage that starts from itself": (
        ("init_from: meta", "init_from: tune"),
        "run.yaml:19:5: stages.tune.init_from: stage 'tune' is this stage itself",
    ),
    "stage that starts from one without a policy": (
        ("      steps: 2k", "      steps: 2k\n  more:\n    type: evaluate\n    init_from: tune"),
        "run.yaml:26:5: stages.more.init_from: stage 'tune' is of type finetune, which does "
        "not produce a single policy; trained stages: meta",
    ),
    "stage name that escapes the run folder": (
        ("  meta:\n", "  ../meta:\n"),
        "run.yaml:14:3: stages.../meta: a stage's name must be letters, digits, '.', '_' or '-', "
        "at most 64, the first a letter or digit",
    ),
    "run name that escapes the run folder": (
        ("name: fine", "name: ../fine"),
        "run.yaml:1:1: name: must be letters, digits, '.', '_' or '-', at most 64, the first a "
        "letter or digit, found '../fine'",
    ),
    "duplicate key": (
        ("  goals: 5", "  goals: 5\n  goals: 6"),
        "run.yaml:5:3: tasks.goals: set twice, first in line 4",
    ),
    "anchor": (
        ("goals: 5", "goals: &a 5"),
        "run.yaml:4:10: not valid YAML: anchors (&) and aliases (*) are not allowed; "
        "write the value out",
    ),
    "tag": (
        ("goals: 5", "goals: !!python/object/apply:os.system [true]"),
        "run.yaml:4:10: not valid YAML: tags such as "
        "'tag:yaml.org,2002:python/object/apply:os.system' are not allowed",
    ),
    "tab": (
        ("  goals: 5", "\tgoals: 5"),
        "run.yaml:4:1: not valid YAML: found character '\\t' that cannot start any token",
    ),
}


@pytest.mark.parametrize("mistake", CORPUS)
def test_a_mistake_is_named_with_its_place(mistake):
    (old, new), expected = CORPUS[mistake]
    message = errors(edited(old, new)).splitlines()
    assert message[0] == expected
    column = int(expected.split(":")[2])
    assert message[2] == " " * (4 + column - 1) + "^"


def test_the_offending_line_stands_under_the_message():
    expected = """\
        run.yaml:12:3: algorithm.iner_lr: unknown setting; did you mean 'inner_lr'?
              iner_lr: 0.1
              ^"""
    assert errors(edited("inner_lr: 1e-3", "iner_lr: 0.1")) == textwrap.dedent(expected)


def test_all_mistakes_of_a_file_are_shown_in_its_order():
    text = GOOD.replace("inner_lr: 1e-3", "iner_lr: 1").replace("goals: 5", "goals: x")
    text = text.replace("hidden: [32]", "hiden: [32]").replace("env_steps: 1e4", "env_steps: x")
    text = text.replace("init_from: meta", "init_from: m")
    places = [line.split(": ")[0] for line in errors(text).splitlines() if "run.yaml" in line]
    assert places == [f"run.yaml:{place}" for place in ("4:3", "9:5", "12:3", "16:5", "19:5")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("- a\n", "the file holds no settings"),
        ("stages: {a: {type: pretrain, env_steps: 1}}\n", "tasks: this setting is required"),
        ("a: [" * 30 + "]" * 30, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n" * 25_000, "too long for a config"),
        ("x: " + "a" * 1_000_001, "larger than 1 MB"),
        ("a: " + "9" * 10_000, "limit"),
        ("a: \x00", "not valid YAML"),
        ("a: *b", "aliases (*) are not allowed"),
        ("? [a]\n: 1", "a key must be a plain scalar"),
        ("--- a: 1\n--- b: 2", "not valid YAML"),
    ],
)
def test_hostile_text_is_one_sentence(text, expected):
    message = errors(text)
    assert expected in message
    assert len(message) < 1000


def test_whatever_the_text_the_answer_is_settings_or_a_config_error():
    rng = np.random.default_rng(0)
    pieces = [
        "{",
        "}",
        "[",
        "]",
        ":",
        "-",
        "&a ",
        "*a",
        "!",
        "\n",
        "  ",
        "\t",
        "'",
        "1e9",
        "null",
        "#",
    ]
    for _ in range(300):
        text = GOOD
        for _ in range(rng.integers(1, 4)):
            at, skip = rng.integers(len(text)), rng.integers(0, 4)
            text = text[:at] + pieces[rng.integers(len(pieces))] + text[at + skip :]
        with suppress(ConfigError):
            assert parse_config(text, "run.yaml").stages


def test_a_file_that_is_missing_or_binary_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    overrides = ["algorithm.inner_lr=0.25", "workers.num=0", "stages.meta.env_steps=2M"]
    config = load_config(tmp_path / "run.yaml", [*overrides, "network.encoder.hidden=[8, 8]"])
    assert config.algorithm.settings.inner_lr == 0.25
    assert config.workers.num == 0
    assert config.stages["meta"].env_steps == 2_000_000
    assert config.network.settings.encoder.settings.hidden == (8, 8)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm.iner_lr=0.1",
            "command line: algorithm.iner_lr: unknown setting; did you mean 'inner_lr'?\n"
            "    algorithm.iner_lr=0.1",
        ),
        ("workers.num=two", "command line: workers.num: must be a whole number, found 'two'"),
        (
            "stages.mta.env_steps=1",
            "command line: stages.mta.env_steps: there is no stage 'mta'; did you mean 'meta'?",
        ),
        ("tasks.goals.x=1", "command line: tasks.goals.x: 'goals' is not a section"),
        ("seed.x=1", "command line: seed: must be a whole number, found a section"),
        ("name.x=1", "command line: name: must be a text (put it in quotes), found a section"),
        (
            "workers.num",
            "command line: workers.num: an override has the form 'key.path=value'",
        ),
        ("=3", "command line: an override has the form 'key.path=value'"),
        ("workers.num=[", "command line: workers.num: not valid YAML"),
        ("workers.num=&a 1", "command line: workers.num: not valid YAML: anchors (&)"),
        ("tasks=bandti", "command line: tasks.type: unknown type 'bandti'"),
    ],
)
def test_a_mistake_in_an_override_is_placed_on_the_command_line(override, expected):
    assert errors(GOOD, override).startswith(expected)


def test_a_stage_whose_name_has_dots_can_be_overridden():
    text = GOOD.replace("  meta:\n", "  v1.0:\n").replace("init_from: meta", "init_from: v1.0")
    config = parse_config(text, "run.yaml", ["stages.v1.0.env_steps=7"])
    assert config.stages["v1.0"].env_steps == 7


def test_a_component_may_be_written_as_its_type_alone():
    text = GOOD.replace("algorithm:\n  type: ", "algorithm: ").replace("  inner_lr: 1e-3\n", "")
    config = parse_config(text, "run.yaml", ["algorithm.inner_lr=0.5"])
    assert config.algorithm.settings == Algorithm.Config(inner_lr=0.5)


def test_a_component_made_in_python_may_be_its_type_alone():
    assert Network.Config(encoder="gru").encoder == Component(type="gru")


def test_a_component_with_a_default_needs_no_type():
    text = GOOD.replace(f"    type: {__name__}:Encoder\n", "")
    assert parse_config(text, "run.yaml") == parse_config(GOOD, "run.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e6", 1e6),
        ("-2.5E+3", -2500.0),
        ("1_000", 1000),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("12:30", "12:30"),
        ("08", "08"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-3'", "1e-3"),
        ("null", None),
    ],
)
def test_yaml_values_are_what_they_look_like(text, value):
    read = parse("x", f"a: {text}").data["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("value", ["1e-3", "true", "on", "", "null", 1e-30, 1e20, -3, "a: b", "~"])
def test_dumped_values_read_back(value):
    assert parse("x", dump({"a": [value]})).data == {"a": [value]}


def schema_models(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    queue = [field.annotation for field in model.model_fields.values()]
    while queue:
        annotation = queue.pop()
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            found |= schema_models(annotation)
        queue.extend(get_args(annotation))
    return found


def typos(word: str) -> set[str]:
    dropped = {word[:i] + word[i + 1 :] for i in range(len(word))}
    swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    changed = {word[:i] + c + word[i + 1 :] for i in range(len(word)) for c in "qx"}
    added = {word[:i] + "q" + word[i:] for i in range(len(word) + 1)}
    return {typo for typo in dropped | swapped | changed | added if typo} - {word}


@pytest.mark.parametrize("model", sorted(schema_models(RunConfig), key=lambda m: m.__name__))
def test_every_typo_of_one_letter_is_understood(model):
    assert model.model_fields
    for name in model.model_fields:
        for typo in typos(name) - set(model.model_fields):
            assert did_you_mean(typo, model.model_fields) == f"; did you mean '{name}'?"


def test_short_names_are_unambiguous():
    from dmrl_ray.config.components import SHORT_NAMES

    names = [name for group in SHORT_NAMES.values() for name in group]
    assert len(names) == len(set(names))
