"""Constraints and files that cost more than they look: how long until they are done or refused, and in what memory."""
