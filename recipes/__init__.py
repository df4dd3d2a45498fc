"""Recipes shipped with the plugin."""
