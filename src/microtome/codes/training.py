"""Codes of training: what ends it, what its plan asks for, what it writes."""

from types import MappingProxyType

from microtome.codes.fault import Fault

AREA = "Training"

FAULTS = MappingProxyType(
    {
        "D060": Fault(
            "The checkpoint cannot be read",
            "The file in RUN/checkpoints is damaged. microtome writes it in one step, so that a kill does not leave half of one; a failing "
            "disk or an interrupted copy does.",
            "Nothing needs to be done where the line says that the run goes on from the checkpoint before it. Where both are damaged, copy the run "
            "folder again if it was copied, or start again into a new folder, without --resume.",
        ),
        "D061": Fault(
            "The checkpoint belongs to another plan",
            "The network in the checkpoint is not the one that plan.yaml describes: the plan was changed after the training began.",
            "Put the plan back as it was, or train with the new one into another --out.",
        ),
        "C041": Fault(
            "The plan or the run was made for other data",
            "Classes, channels, axes, or the cases that train and validate differ from those that the plan or the interrupted run was made "
            "with. Files were added, removed or renamed, or this is another folder.",
            "For a new training plan anew: `microtome plan DATA --out plan.yaml`. To resume, bring the data back as they were.",
        ),
        "C042": Fault(
            "Not enough memory for this",
            "A step of the training, or a slab of the prediction, takes more memory than is free or was allowed. It is said before it begins, "
            "as the system would end the program without a word.",
            "Allow more with --memory, or close other programs. For training make `micro_batch`, `batch` or `patch_vox` in plan.yaml smaller, "
            "or set `checkpointing: true`.",
        ),
        "C050": Fault(
            "More processes than patches in a batch",
            "`torchrun`, or the job script, started more processes than one training step has patches. Each needs one at least, as the batch "
            "is what the plan says, however many share it.",
            "Start fewer processes, or make `batch` in plan.yaml larger: a multiple of the number of processes keeps all of them busy.",
        ),
        "C051": Fault(
            "Half of what starts several processes",
            "WORLD_SIZE says that several processes train together, and the environment lacks what else torchrun sets: which of them this is, "
            "and where they find each other.",
            "Start with `torchrun --nproc-per-node 2 -m microtome train ...`, or set all that the line names in the job script. "
            "For a training in one process run `unset WORLD_SIZE`.",
        ),
        "C052": Fault(
            "No fixed order of sums on this GPU",
            "`--deterministic` asks for the same bits each time. An operation of this network (3D max-pooling and linear upsampling are the usual "
            "ones) exists on a GPU only in a form that adds in no fixed order, or the environment asks cuBLAS for such forms.",
            "Leave out `--deterministic`, choose a network without that operation (the default one has none that we know of), or train with "
            "`--device cpu`.",
        ),
        "R130": Fault(
            "One of several processes was lost",
            "A process of a training in several ended before the others: it was killed, memory ran out, its machine is gone, or it met an "
            "error, which stands above. The others have ended too, as each holds a part of every step.",
            "Look at what that process said, and at `dmesg` for memory that ran out. Then go on with the same command and --resume: "
            "the last checkpoint is good. It may be another number of processes.",
        ),
        "R131": Fault(
            "Not all processes came",
            "A training in several processes waited for all of them to start, and some did not, or could not reach the address where they meet.",
            "See that the job script starts as many as it says, and that every machine reaches MASTER_ADDR at MASTER_PORT. With several network "
            "cards name one: `GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0`.",
        ),
        "R132": Fault(
            "The processes begin with different weights",
            "Each process of a training in several reads the run folder, or draws the first weights from the seed, and they did not get the "
            "same: the folder is not one file system for all machines, or they have different versions of torch.",
            "Give --out on a file system that all machines share, and install the same versions of everything.",
        ),
        "R001": Fault(
            "The folder cannot be written to",
            "The folder belongs to another account, or the drive is read-only, damaged or gone. What was there before is unchanged.",
            "Look at `df -h FOLDER` and `ls -ld FOLDER`, or choose another --out; a training then goes on with --resume.",
        ),
        "R102": Fault(
            "The disk is full",
            "A file has no room, or what this account may have of the disk is used up. The line says how many bytes the file needs and how "
            "many are free. What was there before is unchanged.",
            "Free as many bytes as are missing (`df -h FOLDER`, `du -sh FOLDER/*`), then go on with --resume, or choose an --out on a larger "
            "disk. A training keeps two checkpoints and one model, and needs room for one more of them while it writes it.",
        ),
        "R002": Fault(
            "Not enough room on the disk for the prepared images",
            "Training reads patches from prepared copies of the images, which are too large for what is free, even compressed.",
            "Free as many bytes as the line says and go on with --resume, or choose an --out on a larger disk.",
        ),
        "R003": Fault(
            "The loss is not finite",
            "The loss became NaN or infinite: the learning rate is too high for this network, half precision overflowed, or an image holds "
            "extreme values.",
            "Lower `optimiser.learning_rate` in plan.yaml, or set `precision: fp32`, then go on with --resume. "
            "`microtome inspect DATA` shows images with unusual intensities.",
        ),
        "R004": Fault(
            "The training was asked to stop",
            "Ctrl-C, or the system, ended it before its last step. All that is needed to go on was saved.",
            "Go on with the same command and --resume.",
        ),
        "R005": Fault(
            "Too little time is left to train in",
            "Preparing the images took nearly all of the minutes that were given.",
            "Give more --minutes with --resume; what was prepared is kept.",
        ),
        "R006": Fault(
            "A prepared image is damaged",
            "A stored array in the run folder is not whole: a disk failed, or a file was changed or copied incompletely.",
            "Remove the folder that the line names and go on with --resume: it is prepared again.",
        ),
        "R101": Fault(
            "Old prepared images cannot be removed",
            "The run folder holds prepared images of another plan or of a process that was killed, and they cannot be removed: the disk fails, "
            "or they belong to another account.",
            "Remove the folder that the line names yourself, then go on with --resume: what is needed is prepared again.",
        ),
        "R121": Fault(
            "Another process uses the run folder",
            "A training holds the lock of this folder. Two of them would overwrite each other's checkpoints. The lock of a process that ended, "
            "killed or not, is recognised on its own machine; on a network drive another machine may hold it.",
            "Wait until it ends, or give another --out. Only where its machine shows no such process any more, remove the lock that the line "
            "names.",
        ),
        "R122": Fault(
            "Not even one patch fits into memory",
            "The memory ran out in a training step, which was taken again in ever smaller micro-batches, down to a single patch with "
            "activations computed anew, and that did not fit either.",
            "Close other programs, or make `patch_vox` smaller in plan.yaml, then go on with --resume. A plan for less memory comes from "
            "`microtome plan DATA --memory GB`.",
        ),
        "R125": Fault(
            "Memory ran out beside the network",
            "Not in the network's own work, whose micro-batches are halved then, but in what a training does beside it: the optimiser's "
            "state, patches (these were made a second time), reading and preparing images, scores. A step that was half taken is given up.",
            "Close other programs, or set a smaller `micro_batch` in RUN/plan.yaml, which leaves more to the rest (batch norm takes its "
            "statistics of a micro-batch: of 1 they are poor), or `checkpointing: true`; then the same command with --resume. Where one image alone is too large, cut it into parts.",
        ),
    }
)
