"""Configs of other programs: would they run a CogVideoX that was trained in bf16 in fp16, where it turns black?"""
