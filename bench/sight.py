"""How soon a policy finds what it has to reach: a drawn table, coloured marks, a hand, one or two cameras.

    python bench/sight.py                                       # flow's encoders, one mark: 15 minutes on two cores
    python bench/sight.py --marks 3 --steps 900 --backbones pyramid

The hand moves to a mark, above it first. Of several marks, the words of the task name the colour. The policy learns from 50
demonstrations for each mark, from as many positions, and is tried from positions that it has not seen. Printed are the error
of its first action there, the nearest that the hand comes to the mark, and the share of tries in which it touches it.

Encoders: pyramid (flow's), conv (flow's before), resnet18 from random weights with a spatial softmax, as in Diffusion Policy
(Chi et al. 2023), and any other of flow's setting `backbone`.

B samples, N tries, M marks, T steps of a chunk, P pixels.
"""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from common import benchmark_parser, print_json
from lerobot.configs import FeatureType, PolicyFeature
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from policy.factory import build_policy, policy_config
from processors.augment import augment

P = 64
COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.2), "blue": (0.2, 0.3, 0.85)}
TASKS = [f"reach the {colour} mark" for colour in COLOURS]
THINGS = (
    ((0.8, 0.8, 0.15), (0.6, 0.5, 0.2)),
    ((-0.9, 0.7, 0.1), (0.35, 0.3, 0.5)),
    ((0.0, 1.1, 0.1), (0.25, 0.45, 0.45)),
)
FOCAL = 2.0  # of half a picture's width
MARK = 0.06  # radius; also how near the hand has to come
STEP = 0.035  # the longest move along an axis
LONGEST = 120  # actions of a try
TRIES = 90
STATE = "observation.state"


class Camera:
    """A pinhole camera with a background of its own."""

    def __init__(self, eye: tuple[float, float, float], number: int):
        self.eye = torch.tensor(eye)
        forward = torch.tensor([0.0, 0.1, 0.0]) - self.eye
        forward = forward / forward.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
        right = right / right.norm()
        self.axes = torch.stack([right, torch.linalg.cross(forward, right), forward])
        generator = torch.Generator().manual_seed(number)
        cloth = torch.rand(1, 3, 6, 6, generator=generator)
        cloth = torch.nn.functional.interpolate(cloth, size=(P, P), mode="bilinear")
        self.background = 0.5 + 0.12 * cloth + 0.08 * torch.rand(1, 1, P, P, generator=generator)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (..., 2) of points (..., 3), and pixels per unit of length there (...)."""
        seen = (points - self.eye) @ self.axes.T
        scale = FOCAL * P / 2 / seen[..., 2]
        return seen[..., :2] * scale[..., None] + P / 2, scale

    def picture(self, hand: Tensor, marks: Tensor) -> Tensor:
        """(N, 3, P, P) uint8 of hands (N, 3) and marks (N, M, 2)."""
        image = self.background.expand(len(hand), -1, -1, -1)
        for place, colour in THINGS:
            where, scale = self.project(torch.tensor(place).expand(len(hand), 3))
            image = paint(image, disc(where, 0.14 * scale), colour)
        for number, colour in enumerate(list(COLOURS.values())[: marks.shape[1]]):
            flat = torch.nn.functional.pad(marks[:, number], (0, 1))
            where, scale = self.project(flat)
            image = paint(image, disc(where, MARK * scale), colour)
        shadow, shadow_scale = self.project(hand * torch.tensor([1.0, 1.0, 0.0]))
        tip, scale = self.project(hand + torch.tensor([0.0, 0.0, 0.05]))
        top, _ = self.project(hand + torch.tensor([0.0, 0.15, 1.6]))
        image = paint(image, 0.25 * disc(shadow, 0.09 * shadow_scale), (0.0, 0.0, 0.0))
        image = paint(image, bar(tip, top, 0.09 * scale), (0.2, 0.2, 0.22))
        image = paint(image, disc(tip, 0.07 * scale), (0.75, 0.7, 0.3))
        return (255 * image + 0.5).to(torch.uint8)


CAMERAS = [Camera((0.0, -2.4, 2.0), 0), Camera((2.3, 0.6, 1.4), 1)]
PIXELS = torch.stack(torch.meshgrid(torch.arange(P) + 0.5, torch.arange(P) + 0.5, indexing="xy"), dim=-1)  # (P, P, 2)


def disc(middle: Tensor, radius: Tensor) -> Tensor:
    """(N, P, P) how much of each pixel discs cover: middles (N, 2) and radii (N,) in pixels."""
    return bar(middle, middle + 1e-3, radius)


def bar(start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
    """(N, P, P) how much of each pixel bars with round ends cover."""
    along = (end - start)[:, None, None]  # (N, 1, 1, 2)
    offset = PIXELS - start[:, None, None]  # (N, P, P, 2)
    share = ((offset * along).sum(-1) / along.pow(2).sum(-1)).clamp(0, 1)
    distance = (offset - share[..., None] * along).norm(dim=-1)
    return (radius[:, None, None] - distance + 0.5).clamp(0, 1)


def paint(image: Tensor, cover: Tensor, colour: tuple[float, float, float]) -> Tensor:
    return torch.lerp(image, torch.tensor(colour)[:, None, None], cover[:, None])


@dataclass
class Scenes:
    """Tables: hands (N, 3), marks (N, M, 2), and the number of the mark to reach (N,)."""

    hand: Tensor
    marks: Tensor
    task: Tensor

    @property
    def goal(self) -> Tensor:
        return self.marks[torch.arange(len(self.marks)), self.task]

    def expert(self) -> Tensor:
        """(N, 3) actions in [-1, 1]: above the mark, then down."""
        is_above = (self.goal - self.hand[:, :2]).norm(dim=1) < 0.08
        height = torch.where(is_above, 0.0, 0.3)
        return (5 * (torch.cat([self.goal, height[:, None]], dim=1) - self.hand)).clamp(-1, 1)

    def move(self, action: Tensor) -> None:
        self.hand = self.hand + STEP * action.clamp(-1, 1)
        self.hand[:, 2].clamp_(min=0)

    def distance(self) -> Tensor:
        """(N,) from the hand to the mark."""
        return (self.hand - torch.nn.functional.pad(self.goal, (0, 1))).norm(dim=1)

    def touches(self) -> Tensor:
        return ((self.hand[:, :2] - self.goal).norm(dim=1) < MARK) & (self.hand[:, 2] < 0.1)


def scenes(count: int, num_marks: int, seed: int) -> Scenes:
    """Tables whose marks are apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([1.4, 1.2])
    corner = torch.tensor([-0.7, -0.5])
    tried = corner + room * torch.rand(20 * count, num_marks, 2, generator=generator)
    apart = torch.cdist(tried, tried) + 9 * torch.eye(num_marks)
    marks = tried[apart.amin((1, 2)) > 0.25][:count]
    hand = torch.tensor([0.0, -0.4, 0.8]) + 0.1 * torch.randn(count, 3, generator=generator)
    return Scenes(hand, marks, torch.arange(count) % num_marks)


def demonstrations(count: int, num_marks: int, seed: int) -> dict[str, Tensor]:
    """Frames of the expert's episodes, one after another: states, actions, tasks, ends of episodes, and each camera's pictures."""
    table = scenes(count, num_marks, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    steps = {"state": [], "action": [], "kept": []}
    after = torch.zeros(count)
    for _ in range(90):
        action = table.expert()
        for name, value in (("state", table.hand), ("action", action), ("kept", after < 6)):
            steps[name].append(value.clone())
        table.move(action + 0.2 * torch.randn(count, 3, generator=generator))  # executed, not recorded
        after += table.touches()
    steps = {name: torch.stack(values, dim=1) for name, values in steps.items()}  # (N, steps, ...)
    episode, step = steps["kept"].nonzero(as_tuple=True)
    frames = {name: steps[name][episode, step] for name in ("state", "action")}
    frames["task"] = table.task[episode]
    frames["end"] = steps["kept"].sum(1).cumsum(0)[episode]
    for number, camera in enumerate(CAMERAS):
        parts = zip(frames["state"].split(256), table.marks[episode].split(256), strict=True)
        frames[camera_key(number)] = torch.cat([camera.picture(*part) for part in parts])
    return frames


def moving_average(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """As --ema_decay 0.995 averages, over less at first."""
    return torch.lerp(average, weight, max(0.005, 9 / (10 + count.item())))


def camera_key(number: int) -> str:
    return f"observation.images.{number}"


class Trial:
    """One policy that learns from demonstrations and is tried on tables that it has not seen."""

    def __init__(self, backbone: str, args, num_marks: int, seed: int):
        torch.manual_seed(seed)
        self.frames = demonstrations(50 * num_marks, num_marks, seed=1000 * seed)
        self.cameras = [camera_key(number) for number in range(args.cameras)]
        self.num_marks = num_marks
        overrides = [f"backbone={backbone}", *(args.policy_args or [])]
        config = policy_config("flow", overrides, "cpu")
        config.input_features = {key: PolicyFeature(FeatureType.VISUAL, (3, P, P)) for key in self.cameras}
        config.input_features[STATE] = PolicyFeature(FeatureType.STATE, (3,))
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
        config.tasks = TASKS[:num_marks]
        self.policy = build_policy(config, None)
        self.average = AveragedModel(self.policy, avg_fn=moving_average)
        self.optimizer = config.get_optimizer_preset().build(self.policy.parameters())
        self.schedule = config.get_scheduler_preset().build(self.optimizer, args.steps)
        self.augmentation = SimpleNamespace(
            augment=True, augment_style="fast", camera_dropout=0.0, state_noise=0.0,
            state_dropout=args.state_dropout, seed=seed,
        )  # fmt: skip
        values = {STATE: self.frames["state"], "action": self.frames["action"]}
        stats = {name: {"mean": value.mean(0), "std": value.std(0)} for name, value in values.items()}
        for key in self.cameras:
            pictures = self.frames[key].float() / 255
            mean, std = pictures.mean((0, 2, 3)), pictures.std((0, 2, 3))
            stats[key] = {"mean": mean[:, None, None], "std": std[:, None, None]}
        self.meta = SimpleNamespace(camera_keys=self.cameras, stats=stats)

    def normalised(self, batch: dict) -> dict:
        stats = self.meta.stats
        return batch | {key: (batch[key] - stats[key]["mean"]) / stats[key]["std"] for key in stats if key in batch}

    def step(self, step: int, batch_size: int = 64) -> float:
        """One optimizer step. Returns the loss."""
        frames = self.frames
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(frames["task"]), (batch_size,), generator=generator)
        batch = {key: frames[key][rows].float() / 255 for key in self.cameras}
        batch[STATE] = frames["state"][rows]
        batch["sample"] = step * batch_size + torch.arange(batch_size)
        batch = augment(batch, self.meta, self.augmentation)
        chunk = rows[:, None] + torch.arange(self.policy.config.chunk_size)  # (B, T)
        end = frames["end"][rows][:, None]
        batch["action"] = frames["action"][chunk.minimum(end - 1)]
        batch["action_is_pad"] = chunk >= end
        batch["task"] = [TASKS[task] for task in frames["task"][rows].tolist()]

        self.policy.train()
        loss, _ = self.policy(self.normalised(batch))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.policy)
        return loss.item()

    @torch.no_grad()
    def try_out(self) -> dict:
        """Act by the averaged weights on tables that no demonstration has, always the same ones."""
        policy = self.average.module
        table = scenes(TRIES, self.num_marks, seed=123_456)
        stats = self.meta.stats["action"]
        touched = torch.zeros(TRIES, dtype=torch.bool)
        nearest = table.distance()
        planned = None
        error = None
        for _ in range(LONGEST // policy.config.n_action_steps):
            batch = {
                key: CAMERAS[i].picture(table.hand, table.marks).float() / 255 for i, key in enumerate(self.cameras)
            }
            batch |= {STATE: table.hand, "task": [TASKS[task] for task in table.task.tolist()]}
            chunk = policy.predict_action_chunk(self.normalised(batch), planned=planned)
            planned = chunk[:, policy.config.n_action_steps :]
            actions = chunk * stats["std"] + stats["mean"]
            if error is None:
                error = (actions[:, 0] - table.expert()).abs().mean().item()
            for action in actions[:, : policy.config.n_action_steps].unbind(1):
                table.move(action)
                touched |= table.touches()
                nearest = torch.minimum(nearest, table.distance())
        return {"first_error": error, "nearest": nearest.median().item(), "success": touched.float().mean().item()}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--backbones", nargs="+", default=["pyramid", "conv", "resnet18"])
    parser.add_argument("--marks", nargs="+", type=int, default=[1], choices=[1, 2, 3])
    parser.add_argument("--cameras", type=int, default=2, choices=[1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100, help="steps between tries")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--state_dropout", type=float, default=0.0)
    parser.add_argument("--policy_args", nargs="+", metavar="NAME=VALUE")
    args = parser.parse_args()
    results = []
    print("| encoder | marks | seed | steps | error of the first action | nearest | touched | s per step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for num_marks in args.marks:
        for backbone in args.backbones:
            for seed in range(args.seeds):
                trial = Trial(backbone, args, num_marks, seed)
                seconds = 0.0
                for step in range(args.steps):
                    began = time.perf_counter()
                    trial.step(step)
                    seconds += time.perf_counter() - began
                    if (step + 1) % args.every and step + 1 < args.steps:
                        continue
                    result = {
                        "backbone": backbone,
                        "marks": num_marks,
                        "seed": seed,
                        "steps": step + 1,
                        **trial.try_out(),
                    }
                    result["seconds_per_step"] = seconds / (step + 1)
                    results.append(result)
                    print(
                        f"| {backbone} | {num_marks} | {seed} | {step + 1} | {result['first_error']:.3f} "
                        f"| {result['nearest']:.3f} | {result['success']:.0%} | {result['seconds_per_step']:.2f} |",
                        flush=True,
                    )
    if args.json:
        print_json({"results": results})


if __name__ == "__main__":
    main()
