"""The cluster on a virtual clock: the same engines and the same controller, with modelled steps and links."""
