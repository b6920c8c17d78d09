"""The method: a generator asks, the hospitals answer, a student learns (FedIOD, arXiv 2312.14478, made volumetric).

The same loop teaches a classifier on images: its teachers answer `(B, C)` where a segmenter answers `(B, C, D, H, W)`.

`distill` reads like the algorithm and knows the hospitals only through `protocol.Federation`. Each round:

1. x = G(z, m), m a label map from the public simulator (or x = G(z), or the phantom itself without a generator);
2. the hospitals answer: class probabilities, realism, the discriminator's gradient;
3. the ensemble q is merged and the generator's objective differentiated up to the teachers' logits;
4. the hospitals pull those gradients back to x, and G takes one step;
5. (x, q, m) enters the replay buffer, on which the student takes its steps; they cost no traffic.

Every random draw is a function of (seed, round), so a resumed run equals an uninterrupted one.

Several processes share the networks' work (`parallel`): each makes and learns from its share of a batch. All run this
loop with the same numbers; only the first asks, keeps and reports.
"""
