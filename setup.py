"Packaging for an nbdev project: every field comes from settings.ini, the one place for name, version and requirements."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    url=settings["git_url"],
    project_urls={"Documentation": settings["doc_host"] + settings["doc_baseurl"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["dinov3_nb", "dinov3_nb.*"]),
    py_modules=["_dinov3_nb_command", "_dinov3_nb_docs"],
    package_data={"dinov3_nb": ["tiny/*", "fashion/*", "web/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=shlex.split(settings["requirements"]),
    extras_require={
        "heic": shlex.split(settings["heic_requirements"]),
        "timm": shlex.split(settings["timm_requirements"]),
        "lora": shlex.split(settings["lora_requirements"]),
        "onnx": shlex.split(settings["onnx_requirements"]),
        "demo": shlex.split(settings["demo_requirements"]),
        "notebooks": shlex.split(settings["notebook_requirements"]),
        "dev": shlex.split(settings["dev_requirements"]),
    },
    entry_points={
        "console_scripts": shlex.split(settings["console_scripts"]),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
)
