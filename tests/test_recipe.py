from pathlib import Path

import pytest

from d4m_plugin import InputError, Recipe, TeacherMatching
from tests.toys import Squares


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ipc": 0}, "`ipc` is 0"),
        ({"prototypes": 0}, "`prototypes` is 0"),
        ({"ipc": 10, "prototypes": 3}, "use one of 1, 2, 5, 10"),
        ({"strength": 0.0}, "`strength` is 0.0"),
        ({"strength": 1.1}, "`strength` is 1.1"),
        ({"strength": float("nan")}, "`strength` is nan"),
        ({"num_inference_steps": 1, "strength": 0.7}, "at least 2 steps"),
        ({"guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
        ({"mode_guidance_scale": -0.1}, "`mode_guidance_scale` is -0.1; it must be at least 0"),
        ({"negative_prompt": "blur", "guidance_scale": 1.0}, "'blur', which a `guidance_scale` of 1.0 leaves out"),
        ({"mode_guidance_stop": 0.0}, "`mode_guidance_stop` is 0.0; it must be above 0 and at most 1"),
        ({"oversample": 0}, "`oversample` is 0; it must be at least 1"),
        ({"teacher": "last.ckpt"}, "`oversample` is 1, which leaves it nothing to choose from"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"resolution": -8}, "`resolution` is -8"),
        ({"prompt": "a photo"}, "`prompt` is 'a photo'"),
        ({"seed": -1}, "`seed` is -1"),
        ({"ipc": "10"}, "`ipc` is '10'; it must be a whole number"),
        ({"ipc": True}, "`ipc` is True; it must be a whole number"),
        ({"ipc": 10.0}, "`ipc` is 10.0; it must be a whole number"),
        ({"ipc": 10**12, "prototypes": 7}, "`prototypes` is 7, which does not divide `ipc`"),
        ({"seed": 2**70}, "it must be a whole number below 2^63"),
        ({"strength": "x"}, "`strength` is 'x'; it must be a number"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` is inf"),
        ({"prompt": None}, "`prompt` is None; it must be text"),
        ({"prompt": "{name} \ud800"}, "it must be text"),
        ({"diffusion": Path("x")}, "it must be text or null"),
        ({"resize": "stretch"}, "`resize` is 'stretch'; it must be crop or squash"),
        ({"scheduler_options": ["x"]}, "`scheduler_options` is ['x']; it must be a mapping"),
        ({"scheduler_options": {"a": object()}}, "it must be a mapping from text to what JSON can hold or null"),
        ({"class_names": {"a": ["b"]}}, "it['a'] is ['b']; it must be text or a whole number"),
        ({"class_names": {False: "b"}}, "a key of it is False"),  # YAML's `no`
        (
            {"class_names": "{a: [b]}"},
            "it['a'] is ['b']; it must be text",
        ),  # as the command line sends what is no mapping
        ({"class_names": 3}, "`class_names` is 3, which holds no mapping"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(options, says):
    with pytest.raises(InputError, match=r"^`") as error:
        Recipe(**options)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ipc", "prototypes"), [(1, 1), (10, 10), (99, 99), (100, 50), (200, 50), (120, 40), (127, 127), (106, 106)]
)
def test_prototypes_follow_the_papers_rule(ipc, prototypes, squares):
    assert Recipe(ipc=ipc).resolved(squares).prototypes == prototypes


def test_the_defaults_are_the_papers():
    """D4M, section 4.1 and supplement; the steps are the authors' code's."""
    recipe = Recipe()
    assert (recipe.strength, recipe.guidance_scale, recipe.num_inference_steps) == (0.7, 8.0, 50)
    assert recipe.mode_guidance_scale == 0
    matching = TeacherMatching()
    assert (matching.temperature, matching.loss, matching.mixing) == (20.0, "kl", "cutmix")
    assert (matching.scale_by_temperature, matching.hard_label_weight) == (False, 0.0)


def test_one_full_step_is_enough():
    assert Recipe(num_inference_steps=1, strength=1.0).num_inference_steps == 1


def test_the_prompt_takes_any_class_name():
    recipe = Recipe(prompt="a {name}, {x}").resolved(Squares(classes=("{name} / 🦆", "b")))
    assert recipe.prompts(["{name} / 🦆", "b"]) == ["a {name} / 🦆, {x}", "a b, {x}"]


def test_names_come_before_label_numbers():
    recipe = Recipe(class_names={"1": "one", "0": "zero"}).resolved(Squares(classes=("a", "0", "b")))
    assert recipe.prompts(["a", "0", "b"]) == ["a", "zero", "b"]


def test_label_numbers_may_be_numbers_and_the_order_does_not_matter():
    one, other = Recipe(class_names={1: "b", "a": "c"}), Recipe(class_names={"a": "c", "1": "b"})
    assert list(one.class_names.items()) == list(other.class_names.items()) == [("1", "b"), ("a", "c")]


@pytest.mark.parametrize("content", ["- a list", "{broken", "cat:", None])
def test_a_file_of_class_names_that_is_none_is_named(tmp_path, content):
    if content:
        (tmp_path / "names.yaml").write_text(content)
    with pytest.raises(InputError, match=r"`class_names` is '.*names.yaml', which (cannot be read|holds no mapping)"):
        Recipe(class_names=str(tmp_path / "names.yaml"))


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "names.yaml").write_text("red: crimson")
    recipe = Recipe(diffusion="~/model", vae="~/vae", lora="~/lora", class_names="~/names.yaml")
    assert [recipe.diffusion, recipe.vae, recipe.lora] == [f"{tmp_path}/{part}" for part in ("model", "vae", "lora")]
    assert recipe.class_names == {"red": "crimson"}
