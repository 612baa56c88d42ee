"""The commands of `elang`: what a person starts."""
