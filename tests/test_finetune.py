"""Fine-tuning: what is taken over, what is trained when, what holds the weights, and that it can be resumed exactly."""

import dataclasses
import json

import numpy as np
import pytest
from test_resume import assert_same_run, stop_at

import minires
from minires import nn
from minires.cli import main
from minires.engine import Tensor
from minires.models import BasicBlock, ResNet, create_model
from minires.train import Interrupted, load_recipe, resume, train
from minires.train.checkpoint import Checkpoints
from minires.train.evaluation import evaluate_run
from minires.train.finetune import finetune, finetune_recipe
from minires.train.loop import Run
from minires.train.optimizers import make_optimizer
from minires.train.penalties import Penalty
from minires.train.pretrained import IMAGENET_MEAN, open_network, open_pretrained
from minires.train.recipe import Recipe
from minires.train.schedule import make_schedule
from minires.train.stages import Freezing, lr_factors, stages_of

STAGES = ["stem", "layer1", "layer2", "layer3", "head"]
DIGITS = {"dataset": "digits", "image_size": 8, "batch_size": 128, "threads": 1, "flip": False, "shift": 1}
GREY = {"mean": (0.3,), "std": (0.4,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of 10 and of 7 classes, trained a little, so that running statistics are not those of new ones."""
    folder = tmp_path_factory.mktemp("weights")
    run = train(load_recipe("digits", {**DIGITS, "epochs": 1, "out": str(folder / "run")}))
    state = minires.load(folder / "run" / "model.safetensors")
    minires.save(state, folder / "ten.safetensors")
    state |= {"fc.weight": Tensor(state["fc.weight"].array[:7]), "fc.bias": Tensor(state["fc.bias"].array[:7])}
    minires.save(state, folder / "seven.safetensors")
    assert run.steps == 11
    return folder


def recipe_for(weights, **changes):
    return finetune_recipe(str(weights), changes={"model": "resnet20", **DIGITS, **GREY, "epochs": 2, **changes})


def trained(tmp_path, weights, **changes):
    """(state before, state after) of a run."""
    train(recipe_for(weights, out=str(tmp_path / "run"), **changes))
    return minires.load(weights), minires.load(tmp_path / "run" / "model.safetensors")


def changed(before, after):
    """The names of the tensors that differ; of new heads only in name."""
    return {n for n in before if before[n].array.tobytes() != after[n].array.tobytes()}


# --- what is taken over -------------------------------------------------------------------------------------------


def test_the_head_is_kept_or_new(tmp_path, files):
    run = Run(recipe_for(files / "ten.safetensors", out=str(tmp_path / "a")))
    assert not changed(minires.load(files / "ten.safetensors"), run.model.state_dict())
    assert "head: kept, 10 classes as in the weights" in run.header()
    run.folder.close()
    run = Run(recipe_for(files / "seven.safetensors", out=str(tmp_path / "b")))
    state = run.model.state_dict()
    assert changed(minires.load(files / "seven.safetensors"), state) == {"fc.weight", "fc.bias"}
    assert state["fc.weight"].shape == (10, 64)
    assert "head: new, 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9); the weights had 7" in run.header()
    run.folder.close()
    run = Run(recipe_for(files / "ten.safetensors", head="new", out=str(tmp_path / "c")))
    assert changed(minires.load(files / "ten.safetensors"), run.model.state_dict()) == {"fc.weight", "fc.bias"}
    run.folder.close()


def test_a_run_folder_says_all_about_its_weights(files, tmp_path):
    recipe = finetune_recipe(str(files / "run"), changes={"dataset": "digits", "flip": False, "epochs": 1})
    summary = json.loads((files / "run" / "summary.json").read_text())
    assert (recipe.model, recipe.image_size) == ("resnet20", 8)
    assert (list(recipe.mean), list(recipe.std)) == (summary["mean"], summary["std"])
    for name in ("model.safetensors", "checkpoints/step-00000011.safetensors"):
        found = open_pretrained(files / "run" / name)
        assert (found.model, found.classes, found.mean) == ("resnet20", tuple("0123456789"), recipe.mean)
        assert not changed(found.state, minires.load(files / "run" / "model.safetensors"))


def test_what_is_given_goes_before_what_the_weights_say(files):
    changes = {"dataset": "digits", "flip": False, "mean": (0.1,), "std": (0.2,), "image_size": 16}
    recipe = finetune_recipe(str(files / "run"), changes=changes)
    assert (recipe.mean, recipe.std, recipe.image_size) == ((0.1,), (0.2,), 16)


def test_normalisation_that_nobody_knows_is_said(tmp_path):
    minires.save(create_model("resnet20", 4).state_dict(), tmp_path / "w.safetensors")
    notes = []
    recipe = finetune_recipe(str(tmp_path / "w.safetensors"), note=notes.append)
    assert recipe.mean == IMAGENET_MEAN and (recipe.model, recipe.image_size) == ("resnet20", 32)
    assert len(notes) == 1 and "taking ImageNet's mean 0.485 0.456 0.406" in notes[0]
    network = open_network(tmp_path / "w.safetensors", "resnet20", mean=(0.1,) * 3, std=(1,) * 3, note=notes.append)
    assert len(notes) == 1 and network.mean == (0.1,) * 3 and network.classes[3] == "class 3" and not network.named


def test_options_that_shapes_say(tmp_path):
    """A stem and shortcuts that the model's name does not imply."""
    model = create_model("resnet20", 10, 1, shortcut="B", stem="imagenet")
    minires.save(model.state_dict(), tmp_path / "w.safetensors")
    run = Run(recipe_for(tmp_path / "w.safetensors", out=str(tmp_path / "run"), steps=1))
    assert not changed(model.state_dict(), run.model.state_dict())
    run.go()
    assert evaluate_run(tmp_path / "run").total == 360


def test_the_normalisation_is_remembered(tmp_path, files):
    summary = train(recipe_for(files / "ten.safetensors", out=str(tmp_path / "run"), steps=1))
    assert (summary.mean, summary.std) == ([0.3], [0.4])
    assert open_network(tmp_path / "run").mean == (0.3,)
    assert evaluate_run(tmp_path / "run").top1 == summary.test_accuracy


# --- what is trained ----------------------------------------------------------------------------------------------


def kinds(names):
    """Which of the names are weights of what is no BatchNorm, of BatchNorm, and running statistics."""
    norm = {n for n in names if ".bn" in n or n.startswith("bn")}
    statistics = {n for n in norm if "running" in n or "num_batches" in n}
    return names - norm, norm - statistics, statistics


def of(stages, names):
    return {n for n in names if any(n.startswith({"stem": ("conv1", "bn1"), "head": "fc"}.get(s, s)) for s in stages)}


@pytest.mark.parametrize(
    ("bn", "frozen_statistics", "trained_statistics", "trained_norms"),
    [("auto", False, True, True), ("train", True, True, True), ("eval", False, False, True), ("frozen", *[False] * 3)],
)
def test_frozen_stages_stay_as_they_are(tmp_path, files, bn, frozen_statistics, trained_statistics, trained_norms):
    before, after = trained(
        tmp_path, files / "ten.safetensors", freeze_until="layer3", bn=bn, steps=2, weight_decay=0.1
    )
    weights, norms, statistics = kinds(set(before))
    names = changed(before, after)
    frozen, learned = of(STAGES[:3], set(before)), of(STAGES[3:], set(before))
    assert not names & frozen & (weights | norms)
    assert names & frozen & statistics == (frozen & statistics if frozen_statistics else set())
    assert learned & weights <= names
    assert names & learned & norms == (learned & norms if trained_norms else set())
    assert names & learned & statistics == (learned & statistics if trained_statistics else set())


def test_stages_hold_every_parameter_once():
    for name in ("resnet20", "resnet50", "preact_resnet20", "plain20"):
        model = create_model(name)
        stages = stages_of(model)
        params = [p for modules in stages.values() for module in modules.values() for p in module.parameters()]
        assert len({id(p) for p in params}) == len(params) == len(list(model.parameters()))
    assert list(stages_of(create_model("resnet50"))) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def test_gradual_unfreezing():
    model = create_model("resnet20", 10, 1)
    recipe = Recipe(weights="w", unfreeze_every=2, freeze_until="layer1", epochs=6)
    freezing = Freezing(recipe, model)
    assert freezing.thaws() == {"stem": 0, "layer1": 7, "layer2": 5, "layer3": 3, "head": 1}
    assert [len(freezing.frozen(epoch)) for epoch in range(1, 10)] == [4, 4, 3, 3, 2, 2, 1, 1, 1]
    freezing.train(3)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted == of(["layer3", "head"], {name for name, _ in model.named_parameters()})
    modes = {m.training for m in model.layer2.modules() if isinstance(m, nn.BatchNorm2d)}
    assert modes == {False} and model.layer3[0].bn1.training and model.layer2.training
    freezing.train(5)
    assert model.layer2[0].bn1.training and not model.layer1[0].bn1.training
    table = freezing.table()
    assert [line.split()[0] for line in table[1:]] == STAGES
    assert "no" in table[1] and "no" in table[2] and "from epoch 5" in table[3] and "yes" in table[5]
    assert Freezing(dataclasses.replace(recipe, freeze_until="", unfreeze_every=0), model).frozen(1) == []
    assert Freezing(dataclasses.replace(recipe, freeze_until="head"), model).frozen(99) == STAGES[:-1]


def test_learning_rates_of_stages():
    model = create_model("resnet20", 10, 1)
    recipe = Recipe(lr=0.1, head_lr=10, layer_decay=0.5, decay_norm=False, schedule="cosine")
    assert lr_factors(recipe, model) == {"stem": 1 / 8, "layer1": 1 / 4, "layer2": 1 / 2, "layer3": 1, "head": 10}
    for schedule in ("cosine", "multistep", "one_cycle"):
        changed = dataclasses.replace(recipe, schedule=schedule)
        optimizer = make_optimizer(changed, model)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert [rates[id(p)] for p in (model.conv1.weight, model.layer1[0].bn1.bias, model.fc.bias)] == (
            pytest.approx([0.1 / 8, 0.1 / 4, 1.0])
        )
        assert {g["weight_decay"] for g in optimizer.param_groups if g["params"][0].ndim == 1} == {0}
        plan = make_schedule(changed, optimizer, 50)
        for step in (0, 7, 31):
            now = plan.lrs_at(step)
            np.testing.assert_allclose(np.divide(now, now[0]), np.divide(plan.lrs_at(20), plan.lrs_at(20)[0]))
    plain = make_optimizer(Recipe(), model)
    assert len(plain.param_groups) == 1 and len(plain.param_groups[0]["params"]) == len(list(model.parameters()))


# --- penalties and stopping ---------------------------------------------------------------------------------------


def test_penalties_are_their_definitions():
    """Gradients against differences of the definition's values, in float64."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    start = {"0.weight": rng.normal(size=(2, 3)), "0.bias": rng.normal(size=2)}
    params = dict(model.named_parameters())
    for p in params.values():
        p.grad = Tensor(rng.normal(size=p.shape))
    loss = {name: p.grad.array.copy() for name, p in params.items() if p.grad is not None}
    params["1.bias"].grad = None  # frozen
    Penalty(model, start, l1=0.3, l2_sp=0.7).add_gradients()

    def value(name, w):
        pulled = 0.7 / 2 * ((w - start[name]) ** 2).sum() if name in start else 0.0
        return 0.3 * np.abs(w).sum() + pulled

    for name in ("0.weight", "0.bias", "1.weight"):
        w, grad = params[name].array, params[name].grad
        assert grad is not None
        for i in np.ndindex(w.shape):
            nudge = np.zeros_like(w)
            nudge[i] = 1e-6
            slope = (value(name, w + nudge) - value(name, w - nudge)) / 2e-6
            assert grad.array[i] - loss[name][i] == pytest.approx(slope, abs=1e-7)
    assert params["1.bias"].grad is None
    Penalty(model, start, l1=0.3, decay_norm=False).add_gradients()
    assert params["0.bias"].grad is not None


def test_l2_sp_holds_weights_at_their_start(tmp_path, files):
    distance = {}
    for l2_sp in (0.0, 10.0):
        changes = {"l2_sp": l2_sp, "steps": 12, "bn": "frozen"}
        before, after = trained(tmp_path / str(l2_sp), files / "seven.safetensors", **changes)
        pulled = [n for n in before if not n.startswith("fc") and "num" not in n]
        distance[l2_sp] = sum(float(((after[n].array - before[n].array) ** 2).sum()) for n in pulled)
    assert 0 < distance[10.0] < distance[0.0] / 2


def test_l2_sp_takes_the_place_of_weight_decay_but_for_a_new_head(tmp_path, files):
    recipe = recipe_for(files / "seven.safetensors", l2_sp=0.1, weight_decay=0.2, out=str(tmp_path / "run"))
    run = Run(recipe)
    head = {id(p) for p in run.model.fc.parameters()}
    for group in run.optimizer.param_groups:
        assert {id(p) in head for p in group["params"]} == {group["weight_decay"] == 0.2}
    run.folder.close()


def test_early_stopping_and_the_best_weights(tmp_path, files):
    """At a learning rate of almost nothing no epoch is better than the first."""
    notes = []
    out = tmp_path / "run"
    changes = {"val": 300, "patience": 2, "lr": 1e-12, "epochs": 9, "bn": "frozen", "weight_decay": 0.0}
    recipe = recipe_for(files / "ten.safetensors", out=str(out), **changes)
    assert recipe.final == "best"
    summary = train(recipe, on_note=notes.append)
    per_epoch = (1437 - 300) // 128
    assert (summary.steps, summary.epochs, summary.best_step) == (3 * per_epoch, 3, per_epoch)
    assert any(note.startswith("stopped early: ") for note in notes)
    assert f"of step {per_epoch}" in notes[-1]
    with pytest.raises(ValueError, match="is complete"):
        resume(out)


def test_the_weights_of_the_best_epoch_are_kept(tmp_path, files):
    """After the first epoch the head says the opposite; with a running average, the average of that epoch is kept."""
    for ema in (0.0, 0.5):
        out = tmp_path / str(ema)
        changes = {"val": 300, "lr": 1e-12, "epochs": 3, "bn": "frozen", "weight_decay": 0.0, "ema": ema}
        run = Run(recipe_for(files / "ten.safetensors", out=str(out), **changes))

        def turn_round(step, run=run):
            if step.step == 9:
                with minires.no_grad():
                    run.model.fc.weight.mul_(-1)

        summary = run.go(turn_round)
        assert summary.best_step == 8
        checkpoint = Checkpoints(out / "checkpoints")
        assert summary.best_step < summary.steps and summary.best_step in checkpoint.steps()
        best, final = evaluate_run(out, "best"), evaluate_run(out)
        assert (best.top1, best.loss) == (final.top1, final.loss) == (summary.test_accuracy, pytest.approx(final.loss))
        assert evaluate_run(out, "last").loss != final.loss


# --- resume -------------------------------------------------------------------------------------------------------

ALL = {"unfreeze_every": 1, "freeze_until": "layer1", "layer_decay": 0.8, "head_lr": 3.0, "l1": 1e-5, "l2_sp": 1e-3}
ALL |= {"val": 900, "patience": 3, "epochs": 5, "ema": 0.8, "checkpoint_every": 2}  # 4 steps an epoch


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, files):
    """Stopped within and between epochs in which stages thaw; the file of weights is gone by then."""
    weights = tmp_path / "w.safetensors"
    weights.write_bytes((files / "seven.safetensors").read_bytes())
    train(recipe_for(weights, out=str(tmp_path / "whole"), **ALL))
    stops = stop_at(3, 8, 13)
    with pytest.raises(Interrupted):
        train(recipe_for(weights, out=str(tmp_path / "run"), **ALL), on_step=stops)
    weights.unlink()
    notes = []
    for _ in range(2):
        with pytest.raises(Interrupted):
            resume(tmp_path / "run", on_step=stops)
    resume(tmp_path / "run", on_note=notes.append)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert f"weights: {weights}" in notes and any(note.startswith("head: new") for note in notes)


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path, files):
    """It begins again with what it began with, new head and all."""
    recipe = recipe_for(files / "seven.safetensors", steps=3, out=str(tmp_path / "whole"))
    train(recipe)
    Run(dataclasses.replace(recipe, out=str(tmp_path / "run"))).folder.close()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_start_that_was_damaged_is_noticed(tmp_path, files):
    Run(recipe_for(files / "seven.safetensors", out=str(tmp_path / "run"))).folder.close()
    data = bytearray((tmp_path / "run" / "start.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "run" / "start.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"start\.safetensors is damaged: its checksum is wrong"):
        resume(tmp_path / "run")


# --- from Python, and the command ---------------------------------------------------------------------------------


def test_finetune_from_python(tmp_path, files):
    seen = {"on_step": [], "on_epoch": [], "on_note": []}
    watch = {name: kept.append for name, kept in seen.items()}
    summary = finetune(str(files / "run"), **DIGITS, epochs=1, lr=0.05, out=str(tmp_path / "run"), **watch)
    assert len(seen["on_step"]) == 11 and len(seen["on_epoch"]) == 1 and seen["on_note"][0].startswith("weights: ")
    assert summary.test_accuracy > evaluate_run(files / "run").top1  # a second epoch helps


def test_command(tmp_path, files, capsys):
    flags = ["--data", "digits", "--image-size", "8", "--batch-size", "128", "--threads", "1", "--no-flip"]
    more = ["--steps", "2", "--freeze-until", "layer3", "--head-lr", "10x", "--out", str(tmp_path / "run")]
    assert main(["finetune", "--weights", str(files / "run"), *flags, *more]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.split()[0] in STAGES}
    assert "eval (running" in rows["layer2"] and "train (batch" in rows["layer3"]
    assert " no " in rows["stem"] and rows["head"].split()[1:4] == ["0.1", "650", "yes"]
    assert "head: kept, 10 classes" in out and "normalised by mean" in out
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "3", "--extend"]) == 0
    assert main(["finetune", "--resume", str(tmp_path / "run"), "--steps", "4", "--extend"]) == 0
    assert main(["train", "--weights", "x"]) == 2  # fine-tuning has its own command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--weights says what to begin with"),
        (["--weights", "nowhere.pth"], "there is no file 'nowhere.pth'"),
        (["--weights", "{odd}", "*"], "whose weights are"),
        (["--weights", "{ten}"], "do not say how images are normalised"),
        (["--weights", "{ten}", "--model", "resnet32", "*"], "do not fit resnet32"),
        (["--weights", "{ten}", "--model", "resnet19", "*"], "no model is named 'resnet19'"),
        (["--weights", "{seven}", "--model", "resnet20", "--head", "keep", "*"], "tell 7 classes apart"),
        (["--weights", "{run}", "--freeze-until", "layer9"], "freeze_until='layer9' is not a stage of resnet20"),
        (["--weights", "{run}", "--patience", "2"], "patience=2 needs val"),
        (["--weights", "{run}", "--final", "best"], "final='best' needs val"),
        (["--weights", "{run}", "--head-lr", "10"], '"10" is not a multiple; write 10x'),
        (["--weights", "{run}", "--layer-decay", "1.5"], "layer_decay=1.5 must be above 0 and at most 1"),
        (["--weights", "{run}", "--mean", "0.5"], "mean and std go together"),
        (["--weights", "{run}", "--mean", "1", "2", "--std", "1", "1"], "do not fit the 1 channels"),
        (["--weights", "{run}", "--extend"], "--extend goes with --resume"),
        (["--resume", "{run}", "--recipe", "digits"], "does not go with --resume"),
        (["--weights", "{folder}"], "is a folder, but not of a run"),
        (["--weights", "{rgb}", "--model", "resnet20"], "dataset='digits' has images of 1 channels, and mean"),
        (["--weights", "{head}", "--model", "resnet20", "*"], "are not the weights of a ResNet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line(tmp_path, files, capsys, monkeypatch, arguments, says):
    minires.save(create_model("resnet20", 10).state_dict(), tmp_path / "rgb.safetensors")
    minires.save({"fc.bias": Tensor(np.zeros(3, np.float32))}, tmp_path / "head.safetensors")
    places = {name: str(files / f"{name}.safetensors") for name in ("ten", "seven")}
    places |= {"run": str(files / "run"), "folder": str(files), "rgb": str(tmp_path / "rgb.safetensors")}
    odd = ResNet(BasicBlock, (1, 1, 2), (8, 16, 32), stem="cifar", in_channels=1, shortcut="A")
    minires.save(odd.state_dict(), tmp_path / "odd.safetensors")
    places["odd"] = str(tmp_path / "odd.safetensors")
    places["head"] = str(tmp_path / "head.safetensors")
    monkeypatch.chdir(tmp_path)
    words = [word.format(**places) for word in arguments if word != "*"]
    words += ["--mean", "0.3", "--std", "0.4"] if "*" in arguments else []
    assert main(["finetune", "--data", "digits", "--no-flip", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("minires: error: ")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_not_ended_is_no_start(tmp_path, files):
    with pytest.raises(Interrupted):
        train(load_recipe("digits", {**DIGITS, "out": str(tmp_path / "run")}), on_step=stop_at(1))
    with pytest.raises(FileNotFoundError, match="is a run that has not ended"):
        open_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"freeze_until": "layer2"}, "freeze_until='layer2' needs weights"),
        ({"l2_sp": 0.1}, "l2_sp=0.1 needs weights"),
        ({"bn": "eval"}, "bn='eval' needs weights"),
        ({"probe": True}, "probe=True needs weights"),
        ({"mean": (0.1,), "std": (0.0,)}, "std above 0"),
        ({"mean": (0.1,), "std": ()}, "must be as long"),
        ({"mean": (0.1,), "std": (0.1,), "normalize": "pixel_mean"}, "do not go with normalize='pixel_mean'"),
    ],
)
def test_recipes_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Recipe(**changes)


def test_a_mean_that_does_not_fit_the_images():
    with pytest.raises(ValueError, match="has images of 1 channels"):
        Run(load_recipe("digits", {"mean": (0.1,) * 3, "std": (0.1,) * 3}))
