"""Do both weight gradients of a convolution, that of the map and that of the logits, go faster as one kernel call?

python bench/weight_gradients.py [--batch 32] [--rounds 25]

One call needs both pairs (signal, input) concatenated along the batch. CPU seconds, medians, interleaved.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

LAYERS = [(64, 64, 16, 1), (64, 128, 16, 2), (128, 128, 8, 1), (256, 256, 4, 1), (512, 512, 2, 1)]
"""Channels in, channels out, size of the input and stride: ResNet-18 at 64 pixels."""


def weight_gradient(signal: Tensor, input: Tensor, weight: Tensor, stride: int) -> Tensor:
    geometry = ([stride, stride], [1, 1], [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(signal, input, weight, [0], *geometry, [False, True, False])[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rounds", type=int, default=25)
    given = options.parse_args()
    torch.set_num_threads(1)
    print("| convolution | two calls, ms | one call, ms | ratio |\n| :--- | ---: | ---: | ---: |")
    for inputs, outputs, size, stride in LAYERS:
        weight = torch.randn(outputs, inputs, 3, 3)
        signals = [torch.randn(given.batch, outputs, size // stride, size // stride) for _ in range(2)]
        seen = [torch.randn(given.batch, inputs, size, size) for _ in range(2)]
        times: dict[str, list[float]] = {"two": [], "one": []}
        for _ in range(given.rounds):
            start = time.process_time()
            apart = sum(weight_gradient(g, x, weight, stride) for g, x in zip(signals, seen, strict=True))
            times["two"].append(time.process_time() - start)
            start = time.process_time()
            together = weight_gradient(torch.cat(signals), torch.cat(seen), weight, stride)
            times["one"].append(time.process_time() - start)
        torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-2)
        two, one = (1000 * statistics.median(values) for values in times.values())
        print(f"| {inputs} to {outputs} at {size}, stride {stride} | {two:.1f} | {one:.1f} | {one / two:.2f} |")


if __name__ == "__main__":
    main()
