"""What a user can choose to make a run faster: each is a field of the handle ``Model``, and attached to the transformer only while it runs."""
