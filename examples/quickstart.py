"""A budgeted router in a model: every token gets between 2 and 4 of 16 experts, by its own needs."""

import torch

import circuitroute as cr

experts = [torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)) for _ in range(16)]
layer = cr.MoE(cr.DynamicKRouter(64, 16, kmin=2, kmax=4, temperature=0.25), experts)
hidden = torch.randn(8, 32, 64)
output, routing = layer(hidden, key=cr.random_key(0, torch.arange(8 * 32)))
loss = output.square().mean() + 0.01 * cr.losses.load_balance(routing)
loss.backward()
print(f"{routing.counts.double().mean():.2f} experts per token, log-probability {routing.log_prob.mean():.2f}")

circuit = cr.compile(cr.Exactly(8), 64)
distribution = circuit(torch.randn(4096, 64))
print(f"{circuit.model_count()} subsets; marginals sum to {distribution.marginals.sum(-1).mean():.4f}")
