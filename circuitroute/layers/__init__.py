"""Modules with parameters: routers, a small sparse layer, and budgets over the layers of a model."""
