"""Open loop: what a policy predicts from recorded observations, compared with the actions that were recorded.

`compare` asks for an action at every frame, as the arm does. `measure` and `permutation_importance` predict chunks in batches.
N frames or samples, B samples of a batch, T steps of a chunk from now on, A joints.
"""

import glob
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from data.depth import range_warnings
from data.frames import Frames
from data.loader import Loader
from data.names import joint_names, order_warnings
from data.observations import name_before, observation_names, rename_source, renamed
from data.opening import open_metadata, open_source
from data.source import Source
from errors import UserError, find_path, likeliest_pairs, nearest, rename_flag
from policy.chunk import predict_chunk
from policy.losses import is_training_quantizer, loss_averages_over_actions, set_vqbet_phase
from processors.bases import AUTO, pair_cameras, pairs_line
from processors.features import parse_rename
from processors.padding import preprocess_batch
from processors.pipelines import name_before_rename, to_float_batch
from processors.statistics import is_still
from runtime import EVAL, VALIDATE, seed_all

BATCH_SIZE = 8  # part of the noise's address: another batch size draws other noise


@dataclass
class EpisodeComparison:
    """A recorded episode and what a policy does at each of its frames.

    Attributes:
        episode: its index in the dataset.
        names: (A,) joints.
        predicted, recorded: (N, A) float32 actions in robot units.
        milliseconds: (N,) that each act() took.
        chunks: (N,) how many chunks an AsyncPolicy had begun by then; 0 for a LoadedPolicy.
    """

    episode: int
    names: list[str]
    predicted: np.ndarray
    recorded: np.ndarray
    milliseconds: np.ndarray
    chunks: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """(A,) mean absolute error of each joint."""
        return np.abs(self.predicted - self.recorded).mean(0)


@dataclass
class OpenLoopErrors:
    """Loss and errors of the chunks that a policy predicts for a set of samples.

    Attributes:
        loss: mean of the policy's own loss; None while VQ-BeT trains its quantizer, whose loss is another one.
        error: (T, A) mean absolute error in robot units, as far as the recording goes; None for a policy without chunks.
        std: (A,) standard deviations of the recorded actions; 0 for a joint that is still.
        names: (A,) joints.
        fps: steps of a chunk per second.
    """

    loss: float | None
    error: np.ndarray | None
    std: np.ndarray
    names: list[str]
    fps: float

    def error_by_step(self) -> np.ndarray:
        """(T,) mean over joints, each in its standard deviations; in robot units where no joint moves."""
        moving = self.std > 0
        if not moving.any():
            return self.error.mean(1)
        return (self.error[:, moving] / self.std[moving]).mean(1)

    def metrics(self) -> dict:
        """A line of metrics.jsonl."""
        metrics = {}
        if self.loss is not None:
            metrics["val_loss"] = self.loss
        if self.error is not None:
            by_step = self.error_by_step()
            metrics["val_action_error"] = float(by_step.mean())
            metrics["val_error_by_joint"] = dict(zip(self.names, self.error.mean(0).tolist(), strict=True))
            metrics["val_error_by_step"] = by_step.tolist()
        return metrics


def action_names(meta) -> list[str]:
    """(A,) names of the joints, numbered where the dataset does not give each its own."""
    feature = meta.features["action"]
    names = joint_names(feature)
    if names is None or len(set(names)) < len(names):
        return [f"action {i}" for i in range(feature["shape"][0])]
    return names


def open_for_policy(
    policy,
    dataset_id: str,
    episodes: str | None,
    rename: list[str] | None = None,
    *,
    flag: str = "--episodes",
    rename_others: bool = False,
) -> Source:
    """Open a dataset with only the observations that a policy takes: the files of others may be missing.

    Args:
        policy: a LoadedPolicy.
        dataset_id: a folder, or a Hub id.
        episodes: which episodes, such as "0:5,9"; None for all.
        rename: OLD=NEW, from names in the dataset to those that the policy takes; `auto` pairs the cameras. Names of
            --rename in its training are renamed too, where the dataset has only the old one.
        flag: the flag that `episodes` comes from, for messages.
        rename_others: whether `rename` may have names that the dataset does not have, such as a simulation's.

    Returns:
        The open dataset, under the policy's names. A warning says where the order of its joints is not that of the training.

    Raises:
        UserError: there is no such dataset, something is wrong with it, or it lacks what the policy takes.
    """
    find_path(dataset_id, "--dataset_id")
    meta = open_metadata(dataset_id)
    given = parse_rename(rename)
    if rename_others:
        given = {old: new for old, new in given.items() if old in meta.features}
    names = dict(given)
    for old, new in parse_rename(policy.trained_rename).items():
        has_only_the_old = old in meta.features and new not in meta.features
        takes_only_the_new = new == "action" or (new in policy.expected and old not in policy.expected)
        if has_only_the_old and takes_only_the_new and not {old, new} & {*given, *given.values()}:
            names[old] = new
    check_rename(policy, meta, dataset_id, given)
    warnings = []
    if AUTO in (rename or []):
        features = renamed(meta.features, names)
        pairs = auto_rename(policy, features, cameras_in(features))
        warnings.append(pairs_line(pairs))
        names |= {name_before(names, old): new for old, (new, _) in pairs.items()}
    features = renamed(meta.features, names)
    check_observations(policy, features, dataset_id, given)
    absent = policy.expected.keys() - policy.needed(features).keys()
    if absent:
        empty = ", ".join(sorted(absent))
        warnings.append(f"cameras of the policy that stay empty, since {dataset_id} has none of that name: {empty}")

    wanted = [glob.escape(name_before(names, key)) for key in policy.needed(features)]
    action = name_before(names, "action")
    source = open_source(dataset_id, episodes=episodes, observations=wanted, flag=flag, action=action)
    source.require()
    rename_source(source, {old: new for old, new in names.items() if new != "action"})

    names_here = {}
    for key in ("action", *policy.policy.config.input_features):
        feature = source.meta.features.get(name_before_rename(policy.preprocess, key))
        if feature is not None and joint_names(feature) is not None:
            names_here[key] = joint_names(feature)
    source.warnings += warnings
    source.warnings += order_warnings(policy.joint_names, names_here, "the policy", dataset_id)
    cameras = {key: source.meta.features[key] for key in source.meta.camera_keys}
    source.warnings += range_warnings(policy.depth, cameras, "the policy", dataset_id)
    return source


def cameras_in(features: dict) -> list[str]:
    """The cameras among a dataset's features, as info.json has them."""
    return [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]


def auto_rename(policy, names: Collection[str], cameras: list[str]) -> dict[str, tuple[str, str]]:
    """The pairs of `--rename auto`, as `pair_cameras` returns them, for cameras whose names the policy does not know.

    Args:
        policy: a LoadedPolicy or AsyncPolicy.
        names: of all observations of a dataset or a simulation.
        cameras: those of them that are cameras.
    """
    wanted = [key for key, (kind, _) in policy.expected.items() if kind == "uint8" and key not in names]
    return pair_cameras([key for key in cameras if key not in policy.expected], wanted)


def check_rename(policy, meta, dataset: str, given: dict[str, str]) -> None:
    """Raise a UserError for a --rename from what a dataset does not have, or to what a policy does not take."""
    kinds = expected_kinds(policy)
    for old, new in given.items():
        if new not in (*policy.expected, "action"):
            names = ", ".join(policy.expected)
            raise UserError(
                f"--rename {old}={new}: the policy takes no {new}{nearest(new, kinds) or '.'} It takes {names}"
            )
        if old not in meta.features:
            taken = {*policy.expected, *given}
            candidates = {key: kind for key, kind in feature_kinds(policy, meta.features).items() if key not in taken}
            remedy = f"It has {', '.join(observation_names(meta))}"
            for likeliest in likeliest_pairs({old: kinds.get(new)}, candidates):
                others = {name: to for name, to in given.items() if name != old}
                remedy = f"Did you mean {likeliest}? Pass {rename_flag({likeliest: new}, others)}"
            raise UserError(f"--rename {old}: dataset {dataset} has no such observation. {remedy}")


def check_observations(policy, features: dict, dataset: str, given: dict[str, str]) -> None:
    """Raise a UserError unless a dataset has what a policy takes. Names that it lacks come with the likeliest --rename.

    Args:
        policy: a LoadedPolicy or AsyncPolicy.
        features: the dataset's, as info.json has them.
        dataset: its name.
        given: {old: new} names that were renamed already.
    """
    expected = expected_kinds(policy)
    missing = {key: expected[key] for key in policy.needed(features) if key not in features}
    got = feature_kinds(policy, features)
    wrong = [key for key, kind in expected.items() if key in got and got[key] != kind]
    remedy = "Pass the dataset that the policy was trained on"
    if policy.is_padded:
        remedy += ", and with --trained_on which of them this is"
    if missing:
        if set(missing.values()) == {"picture"}:  # the flag that the message offers does what --rename auto does
            found = auto_rename(policy, features, cameras_in(features))
            pairs = {old: new for old, (new, _) in found.items()}
        else:
            unused = {key: kind for key, kind in got.items() if key not in expected}
            pairs = likeliest_pairs(missing, unused)
        if len(pairs) == len(missing) and not wrong:
            remedy = f"Pass {rename_flag(pairs, given)} if that is the same, or the dataset that it was trained on"
        names = ", ".join(name for name in features if name.startswith("observation"))
        raise UserError(f"dataset {dataset} has no {', '.join(missing)}, which the policy takes: got {names}. {remedy}")
    if wrong:
        key = wrong[0]
        if policy.expected[key][0] == "uint8":
            remedy += ", or train with --image_size, which takes pictures of any size"
        raise UserError(
            f"dataset {dataset}: {key}: expected shape {expected[key]}, which the policy takes, got {got[key]}. {remedy}"
        )


def expected_kinds(policy) -> dict[str, object]:
    """For each observation of a policy, what the dataset's feature must be: of this shape, or "picture" for any size."""
    return {key: "picture" if None in shape else shape for key, (_, shape) in policy.expected.items()}


def feature_kinds(policy, features: dict) -> dict[str, object]:
    """For each observation of a dataset, what it is, to compare with `expected_kinds`."""
    takes_any_size = "picture" in expected_kinds(policy).values()
    kinds = {}
    for key, feature in features.items():
        is_picture = feature["dtype"] in ("video", "image")
        if is_picture or key.startswith("observation."):
            kinds[key] = "picture" if is_picture and takes_any_size else tuple(feature["shape"])
    return kinds


def evenly_spaced_rows(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """(at most `count`,) rows, evenly spaced over the episodes between `starts` and `ends`; all of them for 0."""
    rows = torch.cat([torch.arange(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
    if count == 0 or count >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def recorded_observations(source: Source, episode: int, keys) -> Iterator[tuple[dict, np.ndarray]]:
    """(observation, action) of each frame of an episode in order, as act() takes and returns them."""
    position = source.episodes.index(episode)
    frames = Frames(source)
    try:
        for row in range(int(source.starts[position]), int(source.ends[position])):
            observation = {}
            if source.tasks:
                observation["task"] = source.tasks[int(source.columns["task_index"][row])]
            for key in keys:
                if key in frames.keys:
                    pixels = frames.read(key, torch.tensor([row]))[0]  # (C, H, W)
                    observation[key] = pixels.permute(1, 2, 0).numpy()  # (H, W, C)
                else:
                    observation[key] = np.atleast_1d(source.columns[key][row].numpy())
            yield observation, np.atleast_1d(source.columns["action"][row].numpy())
    finally:
        frames.close()


def compare(policy, source: Source, episode: int, fps: float | None = None) -> EpisodeComparison:
    """Run a policy over a recorded episode as the arm would, asking for an action at every frame.

    Args:
        policy: a LoadedPolicy or AsyncPolicy.
        source: an open dataset that holds the episode.
        fps: how often to ask per second; None for as often as the policy answers.

    Raises:
        UserError: the dataset has other observations or actions than the policy.
    """
    remedy = "Pass the dataset that the policy was trained on"
    features = source.meta.features
    check_observations(policy, features, source.name, source.renamed)
    joints = features["action"]["shape"][0]
    expected = policy.action_width
    if joints != expected:
        raise UserError(f"dataset {source.name} has other actions: expected {expected}, got {joints}. {remedy}")

    policy.reset()  # before seeding: an AsyncPolicy waits here for a thread that may still draw noise
    seed_all(EVAL, episode)  # for policies that draw noise: the same numbers each time
    predicted = []
    recorded = []
    milliseconds = []
    chunks = []
    due = 0.0
    frames = recorded_observations(source, episode, policy.needed(features))
    for observation, action in tqdm(frames, desc=f"episode {episode}", disable=not sys.stderr.isatty()):
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter()
        if fps:
            due = begun + 1 / fps
        predicted.append(policy.act(observation))
        milliseconds.append(1000 * (time.perf_counter() - begun))
        chunks.append(getattr(policy, "chunks", 0))
        recorded.append(action)
    return EpisodeComparison(
        episode=episode,
        names=action_names(source.meta),
        predicted=np.stack(predicted),
        recorded=np.stack(recorded),
        milliseconds=np.array(milliseconds),
        chunks=np.array(chunks),
    )


@torch.no_grad()
def measure(
    policy,
    loader: Loader,
    rows: Tensor,
    seed: int,
    batch_size: int = BATCH_SIZE,
    is_stopped: Callable[[], bool] = lambda: False,
) -> OpenLoopErrors | None:
    """Compare the chunks that a policy predicts with the recording, and compute its loss. Leaves it in eval mode.

    Randomness is a function of (seed, batch): the same weights give the same numbers.

    Args:
        policy: a LoadedPolicy.
        loader: makes the batches.
        rows: (N,) rows of the loader's source, a sample each.
        is_stopped: asked before every batch; if it returns True, the result is None.
    """
    model = policy.policy.eval()
    meta = loader.source.meta
    # Policies that look back have past actions in their windows too: the chunk starts at this step.
    now = loader.deltas["action"].tolist().index(0) if "action" in loader.deltas else 0

    has_loss = not is_training_quantizer(model)
    has_chunks = True
    loss_sum = torch.zeros((), device=policy.device)
    loss_weight = 0
    error_sum = 0.0  # (T, A) from the first batch on, as is the count
    error_count = 0.0
    for number, batch_rows in enumerate(rows.split(batch_size)):
        if is_stopped():
            return None
        seed_all(seed, VALIDATE, number)
        batch = loader.batch_of(batch_rows)
        inputs = preprocess_batch(policy.preprocess, to_float_batch(batch, meta, policy.device))
        padded = batch.get("action_is_pad")  # (B, window)

        if has_loss:
            set_vqbet_phase(model, -1)  # validation does not count as a step
            weight = len(batch_rows)
            if loss_averages_over_actions(model.config) and padded is not None:
                weight = int((~padded).sum())
            loss_sum = loss_sum + model.forward(inputs)[0] * weight
            loss_weight += weight

        if has_chunks:
            try:
                predicted = policy.postprocess(predict_chunk(model, inputs)).float().cpu()  # (B, T, A)
            except NotImplementedError:  # a policy without chunks
                has_chunks = False
                continue
            recorded = batch["action"].float().reshape(len(batch_rows), -1, predicted.shape[-1])[:, now:]
            steps = min(predicted.shape[1], recorded.shape[1])
            valid = torch.ones(1)
            if padded is not None:
                valid = ~padded[:, now : now + steps, None]  # (B, T, 1): steps after the episode's end do not count
            error = (predicted[:, :steps] - recorded[:, :steps]).abs() * valid
            error_sum = error_sum + error.double().sum(0)
            error_count = error_count + valid.double().expand_as(error).sum(0)
    model.reset()

    actions = loader.source.columns["action"].double()
    std = torch.where(is_still(actions), 0.0, actions.std(0)).reshape(-1)
    loss = loss_sum.item() / loss_weight if has_loss else None
    error = None
    if has_chunks:
        error = (error_sum / error_count)[error_count[:, 0] > 0].numpy()
    return OpenLoopErrors(loss=loss, error=error, std=std.numpy(), names=action_names(meta), fps=meta.fps)


@torch.no_grad()
def permutation_importance(policy, loader: Loader, keys, rows: Tensor, std: np.ndarray, seed: int) -> dict | None:
    """How far the predicted actions move when one observation is taken from another moment and the others stay.

    Source: one input is permuted over the samples, as in Breiman, "Random Forests" (2001).

    Args:
        policy: a LoadedPolicy.
        keys: observations of the dataset.
        rows: (N,) rows of the loader's source to try it at.
        std: (A,) standard deviations of the recorded actions, 0 for a joint that is still.

    Returns:
        {key: mean absolute change in standard deviations}, over samples, steps and joints that move; 0 for an input that the
        policy ignores. None for a policy without chunks, for a single sample, or where nothing moves.
    """
    model = policy.policy.eval()
    scale = torch.from_numpy(std)
    moving = scale > 0
    if len(rows) < 2 or not moving.any():
        return None
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    importance = dict.fromkeys(keys, 0.0)

    def predict(batch: dict, number: int) -> Tensor:
        """(B, T, moving joints) in standard deviations, with the same noise for the same number."""
        seed_all(seed, VALIDATE, number)
        # To the CPU before it meets `scale`, which is float64: Macs' GPUs have none.
        actions = policy.postprocess(predict_chunk(model, policy.preprocess(batch))).float().cpu()
        return actions[..., moving] / scale[moving]

    try:
        for number, batch_rows in enumerate(rows.tensor_split(-(-len(rows) // BATCH_SIZE))):  # two samples at least
            batch = to_float_batch(loader.batch_of(batch_rows), loader.source.meta, policy.device)
            unchanged = predict(dict(batch), number)
            for key in keys:
                changed = predict({**batch, key: batch[key].roll(1, 0)}, number)
                importance[key] += (changed - unchanged).abs().mean().item() * len(batch_rows) / len(rows)
    except NotImplementedError:  # a policy without chunks
        return None
    finally:
        model.reset()
    return importance
