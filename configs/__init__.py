"""YAML configs shipped with the plugin."""
