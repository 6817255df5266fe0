"""Predict the next chunk in a thread while the arm carries out the current one, so that no control tick waits for it.

The actions carried out until the prediction is ready are committed; the new chunk starts from them. How: flow blends the
chunk in after them, a policy to which LeRobot gives real-time chunking (RTC) is guided towards them and the planned actions
after them while it denoises, and other policies predict as if nothing were planned.
Source: Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025); LeRobot's policies/rtc.

T steps of a chunk, R planned steps, A joints.
"""

import contextlib
import math
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from errors import UserError, plural
from policy.chunk import chunk_length, execution_horizon, predict_chunk, supports_rtc, switch_rtc_on

RECENT = 30  # predictions whose longest is the delay to expect


class AsyncPolicy:
    """Acts like a LoadedPolicy, on chunks that a thread predicts `lead` control ticks before they are needed.

    In real time (with `fps`), a chunk may come late. A policy with RTC then carries on with the current chunk, holds its last
    action where that has ended, and skips of the new chunk the actions whose ticks have passed. Other policies wait for it.
    Without `fps`, as in simulation, every policy waits, and so acts the same each time.

    Args:
        loaded: a LoadedPolicy. If it has RTC, its weights are frozen, and its config in memory has RTC switched on.
        lead: control ticks that predicting a chunk takes, 1 or more.
        fps: control ticks per second. With RTC, `lead` then follows the longest of the recent predictions.
        clock: returns seconds.

    Attributes:
        lead: ticks ahead that the next chunk is requested.
        actions_per_chunk: how many actions of each chunk are carried out.
        has_rtc: whether chunks are predicted with RTC.
        chunks: how many chunks were begun, over all episodes.
        looks: as of a LoadedPolicy. Always, since any observation may be the one that the thread predicts from.
        late: how many were not ready when they were due. One that comes after all of its ticks is not begun.
        held: for how many ticks the last action was held.

    Raises:
        UserError: the policy does not predict chunks, or they are shorter than twice the lead.
    """

    def __init__(self, loaded, lead: int, fps: float | None = None, clock=time.perf_counter):
        self.loaded = loaded
        self.policy = loaded.policy
        self.device = loaded.device
        self.kind = loaded.kind
        self.expected = loaded.expected
        self.depth = loaded.depth
        self.optional = loaded.optional
        self.needed = loaded.needed
        self.looks = True
        self.lead = lead
        self.fps = fps
        self.clock = clock
        self.has_rtc = supports_rtc(self.policy)
        self.actions_per_chunk = count_actions_per_chunk(loaded, lead)
        if self.has_rtc:
            switch_rtc_on(self.policy)
        self.seconds: deque[float] = deque(maxlen=RECENT)  # of recent predictions, from observation to chunk
        self.warm: set[tuple[int, int]] = set()  # (lead, planned steps) that were predicted with
        self.chunks = 0
        self.late = 0
        self.held = 0
        self.thread = ThreadPoolExecutor(1, "chunks")
        self.pending: Future | None = None  # the next chunk, (1, T, A)
        self.stream = None
        if torch.device(self.device).type == "cuda":
            # in the default stream, an action would wait for the chunk that is being predicted
            self.stream = torch.cuda.Stream(self.device)
        self.reset()

    @property
    def action_width(self) -> int:
        return self.loaded.action_width

    @property
    def is_padded(self) -> bool:
        return self.loaded.is_padded

    def reset(self) -> None:
        """Start an episode: forget past observations and chunks, also the one being predicted."""
        if self.pending is not None:
            self.pending.exception()  # waits for it
        self.loaded.reset()
        self.history: deque[dict] = deque(maxlen=getattr(self.policy.config, "n_obs_steps", 1))
        self.pending = None
        self.chunk: torch.Tensor | None = None  # (1, T, A)
        self.index = 0  # of the action in the chunk that is due now; past the chunk's end, the last action is held
        self.end = 0  # index at which the next chunk is due
        self.requested_at = 0  # index that was due when the pending chunk was requested

    def act(self, observation: dict) -> np.ndarray:
        """The action to carry out now, as LoadedPolicy.act. Only the first call of an episode waits for a chunk."""
        return self.select(self.loaded.batch_of(observation)).squeeze(0).cpu().numpy()

    def select(self, batch: dict) -> torch.Tensor:
        """(1, A) the action to carry out now in robot units, for LeRobot's batch of one moment's observation."""
        begun = self.clock()
        with self._without_gradients():
            observation = self.loaded.preprocess(batch)
            self.history.append(observation)
            while len(self.history) < self.history.maxlen:
                self.history.append(observation)  # at the start of an episode, repeat the first observation

            # Change to the next chunk where this one ends. It was predicted for an earlier tick: skip what is past.
            if self.chunk is None:
                self._start(self._request(begun, planned=None).result(), first=0)
                begun = self.clock()  # the arm sets out now
            elif self.index >= min(self.end, self.chunk.shape[1]) and self._take_next():
                chunk = self.pending.result()
                self.pending = None
                past = self.index - self.requested_at
                # If all of its actions are past, another one is requested below, from where the arm is held now.
                if past < chunk.shape[1]:
                    self._start(chunk, first=past)

            # Request the next chunk as many ticks ahead as it takes.
            if self.pending is None and self.end - self.index <= self.lead:
                self.requested_at = self.index
                self.end = max(self.end, self.index + self.lead)
                self.pending = self._request(begun, self._planned())

            last = self.chunk.shape[1] - 1
            if self.index > last:
                self.held += 1
            action = self.chunk[:, min(self.index, last)]  # (1, A)
            self.index += 1
            return self.loaded.postprocess(action)

    def timing(self) -> str:
        """How punctual the chunks were, in words."""
        line = f"{plural(self.chunks, 'chunk')} begun, {self.late} late"
        if not self.has_rtc:
            return f"{line}, which act() waited for" if self.late else line
        held = f"the last action was held for {plural(self.held, 'tick')}"
        return f"{line}; {held}; chunks are requested {plural(self.lead, 'tick')} ahead now"

    def warm_up(self, observation: dict, runs: int = RECENT) -> None:
        """Predict chunks until that takes no longer than it will in an episode, then measure it and set the lead.

        Args:
            observation: as `act` takes it.
            runs: predictions to measure.

        Raises:
            UserError: a chunk takes longer to predict than half of its actions to carry out.
        """
        self.reset()
        self.act(observation)
        chunk = self.chunk
        # Code is compiled again for other numbers of planned actions or ticks, after two of them for all.
        for start in (1, 2, 3):
            self._predict_now(observation, lead=start, planned=chunk[:, start:])
        self.seconds.clear()
        for _ in range(1 + runs):  # the first one is not counted
            self._predict_now(observation, lead=1, planned=chunk[:, chunk.shape[1] // 2 :])
        self.lead = self._measured_lead()
        self.actions_per_chunk = count_actions_per_chunk(self.loaded, self.lead)
        self._predict_now(observation, self.lead, planned=chunk[:, self.actions_per_chunk :])  # as most of an episode's
        self.reset()
        self.chunks = 0

    def _predict_now(self, observation: dict, lead: int, planned: torch.Tensor) -> None:
        begun = self.clock()
        with self._without_gradients():
            ready = self.loaded.preprocess(self.loaded.batch_of(observation))
        history = [ready] * self.history.maxlen
        self.thread.submit(self._predict, history, planned, lead, begun).result()

    def _without_gradients(self):
        # RTC computes gradients, which it cannot in inference mode nor of tensors that were made in it.
        return torch.no_grad() if self.has_rtc else torch.inference_mode()

    def _take_next(self) -> bool:
        """Whether to change to the pending chunk now, which is due."""
        if self.fps is None or self.pending.done():
            return True
        if self.index == self.end:
            self.late += 1
        return not self.has_rtc

    def _planned(self) -> torch.Tensor:
        """(1, R, A) actions that will be carried out from now on, unless a chunk replaces them: `lead` or more."""
        left = self.chunk[:, self.index :]
        num_held = max(0, self.lead - left.shape[1])
        return torch.cat([left, self.chunk[:, -1:].expand(-1, num_held, -1)], dim=1)

    def _measured_lead(self) -> int:
        return max(1, math.ceil(max(self.seconds) * self.fps))

    def _start(self, chunk: torch.Tensor, first: int) -> None:
        """Carry out a chunk (1, T, A) from its action `first` on."""
        if self.has_rtc and self.fps is not None and self.seconds:
            # After a prediction that took very long, the lead is as long as it may be.
            self.lead = min(self._measured_lead(), chunk.shape[1] // 2)
            self.actions_per_chunk = count_actions_per_chunk(self.loaded, self.lead)
        self.chunk = chunk
        self.chunks += 1
        self.pending = None
        self.index = first
        self.end = min(first + self.actions_per_chunk, chunk.shape[1])

    def _request(self, begun: float, planned: torch.Tensor | None) -> Future:
        return self.thread.submit(self._predict, list(self.history), planned, self.lead, begun)

    def _predict(self, history: list[dict], planned: torch.Tensor | None, lead: int, begun: float) -> torch.Tensor:
        """(1, T, A) from the last observations; `planned` (1, R, A) are the actions planned from the last of them on."""
        config = self.policy.config
        batch = dict(history[-1])
        if config.observation_delta_indices is not None:
            for key in config.input_features.keys() & batch.keys():  # not the cameras that stay empty
                batch[key] = torch.stack([observation[key] for observation in history], dim=1)  # (1, S, ...)
        stream = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with self._without_gradients(), stream:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))  # for the observations
            chunk = predict_chunk(self.policy, batch, planned, lead)
            if self.stream is not None:
                self.stream.synchronize()
        if planned is not None:
            # The first prediction of a kind may compile code, which says nothing about the next ones.
            kind = (lead, planned.shape[1])
            if kind in self.warm:
                self.seconds.append(self.clock() - begun)
            self.warm.add(kind)
        return chunk


def count_actions_per_chunk(loaded, lead: int) -> int:
    """How many actions of a chunk to carry out: n_action_steps, as far as the chunk is long enough for the lead.

    Raises:
        UserError: the policy does not predict chunks ahead, or they are shorter than twice the lead.
    """
    config = loaded.policy.config
    if getattr(config, "temporal_ensemble_coeff", None) is not None:
        raise UserError("temporal ensembling asks for a chunk at every tick. Act without --ahead")
    if loaded.relative:
        raise UserError("the policy's actions are relative to the state they were predicted from. Act without --ahead")
    length, name = chunk_length(config)
    if length < 2 * lead:
        raise UserError(
            f"a chunk takes {lead} control ticks to predict and has {length} actions ({name}): "
            f"expected {2 * lead} or more. Act at a lower rate, or without --ahead"
        )
    # The next chunk needs room to blend, after the actions that are committed while it is predicted.
    blended = getattr(config, "blend_steps", 0)
    if supports_rtc(loaded.policy):
        blended = execution_horizon(config, lead) - lead
    wanted = max(getattr(config, "n_action_steps", 1), lead)
    return max(lead, min(wanted, length - lead - blended))
