import math
import pickle

import pytest

from resu_compile.config import (
    DEFAULT_EXCLUDE,
    CompileConfig,
    ResurrectionConfig,
    SparsityConfig,
    split_options,
)
from resu_compile.errors import ArgumentError, ArgumentTypeError, ResuCompileError


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("sparsity", 1.0, ArgumentError),
        ("sparsity", -0.1, ArgumentError),
        ("sparsity", math.nan, ArgumentError),
        ("sparsity", "0.5", ArgumentTypeError),
        ("method", "rgl", ArgumentError),
        ("method", 3, ArgumentError),
        ("scope", "row", ArgumentError),
        ("distribution", "erdos", ArgumentError),
        ("targets", 3, ArgumentTypeError),
        ("targets", ["fc", 3], ArgumentTypeError),
        ("exclude", 3.5, ArgumentTypeError),
        ("overrides", ["fc"], ArgumentTypeError),
        ("overrides", {3: 0.5}, ArgumentTypeError),
        ("overrides", {"fc": 1.0}, ArgumentError),
        ("overrides", {"fc": "half"}, ArgumentTypeError),
        ("min_density", 1.5, ArgumentError),
        ("min_density", "low", ArgumentTypeError),
        ("tied", "both", ArgumentError),
        ("from_zeros", 1, ArgumentTypeError),
        ("seed", 1.5, ArgumentTypeError),
        ("seed", True, ArgumentTypeError),
    ],
)
def test_a_wrong_sparsity_argument_is_named(argument, value, error):
    with pytest.raises(error, match=f"^{argument}"):
        SparsityConfig(**{argument: value})


def test_global_ranking_decides_the_layers_by_itself():
    with pytest.raises(
        ArgumentError, match="^distribution: expected 'uniform' with scope='global'"
    ):
        SparsityConfig(scope="global", distribution="erk")


def test_selectors_become_tuples():
    config = SparsityConfig(targets=["a", "b"], exclude="c")
    assert config.targets == ("a", "b")
    assert config.exclude == "c"
    assert SparsityConfig().exclude == DEFAULT_EXCLUDE


def test_a_config_with_predicates_can_be_pickled_without_them():
    config = SparsityConfig(0.4, targets=lambda _name, _p: True, exclude=lambda _name, _p: False)
    kept = pickle.loads(pickle.dumps(config.without_predicates()))
    assert kept.sparsity == 0.4
    assert kept.targets is None
    assert kept.exclude is None
    named = SparsityConfig(targets="fc*")
    assert named.without_predicates() == named


# -- resurrection ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", "auto"),
        ("rule", "rmsprop"),
        ("init", "ones"),
        ("eps", -0.1),
        ("freeze_active", 1),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("adam_eps", -1),
        ("momentum", 1.0),
        ("budget", 1.1),
        ("budget", "all"),
        ("score", "taste"),
        ("strategy", "keep"),
        ("kind", "merit"),
        ("margin", -0.1),
        ("margin", True),
    ],
)
def test_a_wrong_resurrection_argument_is_named(argument, value):
    with pytest.raises(ResuCompileError, match=f"^{argument}: expected"):
        ResurrectionConfig(**{argument: value})


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({}, "optimizer"),
        ({"lr": 0.1}, "adam"),
        ({"freeze_active": True}, "adam"),
        ({"rule": "sgd"}, "sgd"),
        ({"rule": "optimizer", "freeze_active": True}, "optimizer"),
    ],
)
def test_the_rule_follows_from_what_it_needs(arguments, rule):
    assert ResurrectionConfig(**arguments).rule == rule


def test_the_optimizer_rule_has_the_optimizers_lr():
    with pytest.raises(ArgumentError, match="^lr: expected None with rule='optimizer'"):
        ResurrectionConfig(lr=0.1, rule="optimizer")


# -- compilation -------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, 0.5, 1.0, "auto"])
def test_threshold(value):
    assert CompileConfig(value).sparse_threshold == value


@pytest.mark.parametrize("value", [-0.1, 1.1, "always", None, True])
def test_a_wrong_threshold(value):
    with pytest.raises(ResuCompileError, match="^sparse_threshold: expected 'auto' or a number"):
        CompileConfig(value)


def test_options_are_split():
    sparsity, compiling = split_options(
        {"sparsity": 0.9, "targets": ["fc"], "sparse_threshold": 1.0, "max-autotune": True}
    )
    assert sparsity == SparsityConfig(0.9, targets=["fc"])
    assert compiling.sparse_threshold == 1.0
    assert compiling.inductor_options == {"max_autotune": True}


def test_an_unknown_option_lists_the_known():
    with pytest.raises(
        ArgumentError,
        match=r"^unknown option 'sparsty' \(did you mean 'sparsity'\?\); known: .*targets",
    ):
        split_options({"sparsty": 0.5})


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, "optimizer"),
        ({"lr": 1e-3}, "adam"),
        ({"freeze_active": True}, "adam"),
        ({"rule": "adam"}, "adam"),
        ({"rule": "sgd", "lr": 0.1}, "sgd"),
        ({"rule": "optimizer", "freeze_active": True}, "optimizer"),
    ],
    ids=range(6),
)
def test_auto_takes_the_optimizer_where_nothing_asks_for_a_step_of_thetas_own(given, rule):
    assert ResurrectionConfig(**given).rule == rule
