"""The mathematics of training and sampling: jax only, and the network is just a function.

Read paths -> parameterization -> timesteps -> losses -> solvers -> guidance; formulation binds them
together, and `formulation.make("rf", "velocity", "logit_normal(0, 1)")` is what a command calls.
"""
