"""What tests share that start processes of their own."""

# For processes that compile nothing with torch. Whatever imports peft imports bitsandbytes, which asks for torch's
# compiler as it is imported: with it a process needs a third more time to start.
WITHOUT_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
