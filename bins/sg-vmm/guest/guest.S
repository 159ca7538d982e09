# The guest: one loop that does what the VMM orders, one page at a time, and checks every page.
#
# Each pass through `next` is one port read: it tells the VMM that the last order is done and
# brings the next one. The loop uses registers only (no stack, no interrupts), so that it needs no
# memory beyond the page it works on and that page's entry in the shadow table. Some hosts emulate
# every instruction of this file: keep it short.
#
#   r8   shadow table: 32 bits a page, expected version, bit 31 = page of the common seed
#   r9   the order being worked on
#   r10  seed of this VM's pages          r11  seed of common pages
#   r12  state of the random numbers      r13  position of sequential writing
#   r14  address that is verified next    r15  bytes from one page of this vCPU to its next
#   rsp  positions in the working set     rbp  address of position 0
#   rbx  the page's address               rdi  offset of its shadow entry
#   rsi  version                          rax, rcx, rdx  scratch
#
# A vCPU's positions count the pages that it owns: address = rbp + position * r15.
# `page_format.rs` holds the same format for the VMM; a test proves that both agree.

        .intel_syntax noprefix
        .set PORT_ORDER,    0xe0
        .set PORT_MISMATCH, 0xe1
        .set PORT_SERIAL,   0x3f8
        .set ORDER_WRITE,   1
        .set ORDER_RANDOM,  2
        .set ORDER_VERIFY,  4
        .set ORDER_RESTART, 8
        .set ORDER_COUNT,   0x100       # bits 8 on: further pages to verify
        .set HEAD_MAGIC,    0x5a7       # low bits of a page's first word; above: its index
        .set COMMON_BIT,    31
        .set K,             0x5bd1e995
        .set VERSION, 8
        .set CHECKSUM, 16
        .set TAIL, 4088

        .text
        .code64
start:                                  # rbx: nonzero on the vCPU that greets
        test    ebx, ebx
        jz      next
        lea     rsi, [rip + banner]
        mov     edx, PORT_SERIAL
1:      mov     al, [rsi]
        test    al, al
        jz      next
        out     dx, al
        inc     rsi
        jmp     1b

        .balign 16
next:
        in      eax, PORT_ORDER
        mov     r9d, eax
        test    al, ORDER_RANDOM
        jz      not_random
        imul    r12, qword ptr [rip + multiplier]
        mov     rax, r12
        mul     rsp                     # the high half is uniform below rsp
check:                                  # rdx: position
        mov     rbx, rdx
        imul    rbx, r15
        add     rbx, rbp
check_page:                             # rbx: address
        mov     rdi, rbx
        shr     rdi, 10
        mov     esi, [r8 + rdi]
        lea     rdx, [rbx + r10]
        test    esi, esi
        jle     special                 # of the common seed, or untouched
mix:
        imul    rdx, rdx, K
        lea     rax, [rbx + HEAD_MAGIC]
        lea     rcx, [rdx + rsi]
        imul    rcx, rcx, K
        cmp     [rbx], rax
        jne     mismatch
        cmp     [rbx + VERSION], rsi
        jne     mismatch
        cmp     [rbx + CHECKSUM], rcx
        jne     mismatch
        cmp     [rbx + TAIL], rsi
        jne     mismatch
        test    r9b, ORDER_WRITE
        jz      verified
write:
        inc     esi
        inc     dword ptr [r8 + rdi]
        add     rcx, K                  # the checksum of the next version
        mov     [rbx + VERSION], rsi
        mov     [rbx + CHECKSUM], rcx
        mov     [rbx + TAIL], rsi
        jmp     next

verified:
        sub     r9d, ORDER_COUNT
        jb      next
verify_one:
        mov     rbx, r14
        add     r14, r15
        jmp     check_page

not_random:
        test    al, ORDER_VERIFY
        jnz     verify
        test    al, ORDER_WRITE
        jz      next                    # nothing to do: a heartbeat
        mov     rdx, r13
        inc     r13
        cmp     r13, rsp
        jb      check
        xor     r13d, r13d
        jmp     check
verify:
        test    al, ORDER_RESTART
        jz      verify_one
        mov     r14, rbp
        jmp     verify_one

special:
        lea     rdx, [rbx + r11]
        and     esi, 0x7fffffff
        jnz     mix
        cmp     [rbx], rsi              # version 0: every word must be zero, as rsi is
        jne     mismatch
        cmp     [rbx + VERSION], rsi
        jne     mismatch
        cmp     [rbx + CHECKSUM], rsi
        jne     mismatch
        cmp     [rbx + TAIL], rsi
        jne     mismatch
        test    r9b, ORDER_WRITE
        jz      verified
        lea     rax, [rbx + HEAD_MAGIC]
        mov     [rbx], rax
        lea     rcx, [rbx + r10]
        imul    rcx, rcx, K
        imul    rcx, rcx, K
        jmp     write

mismatch:                               # tell the VMM (it reads rdi, rsi, rcx) and the console
        mov     rdi, rbx
        shr     rdi, 12
        mov     rcx, [rbx + VERSION]
        out     PORT_MISMATCH, al
        lea     rsi, [rip + complaint]
        mov     edx, PORT_SERIAL
1:      mov     al, [rsi]
        test    al, al
        jz      2f
        out     dx, al
        inc     rsi
        jmp     1b
2:      mov     ecx, 8
3:      rol     edi, 4                  # eight times: rdi is the page again afterwards
        mov     eax, edi
        and     eax, 15
        cmp     al, 10
        jb      4f
        add     al, 39
4:      add     al, 48
        out     dx, al
        dec     ecx
        jnz     3b
        mov     al, 10
        out     dx, al
        # Repair: write what was expected, so that each mismatch is reported once.
        mov     esi, [r8 + rdi * 4]
        mov     rcx, r10
        test    esi, esi
        cmovs   rcx, r11
        add     rcx, rbx
        imul    rcx, rcx, K
        lea     rax, [rbx + HEAD_MAGIC]
        and     esi, 0x7fffffff
        jnz     5f
        xor     eax, eax
        xor     ecx, ecx
        jmp     6f
5:      add     rcx, rsi
        imul    rcx, rcx, K
6:      mov     [rbx], rax
        mov     [rbx + VERSION], rsi
        mov     [rbx + CHECKSUM], rcx
        mov     [rbx + TAIL], rsi
        jmp     check_page

        .balign 8
multiplier:
        .quad   6364136223846793005
banner:
        .asciz  "sg-vmm guest: checking every page I touch\n"
complaint:
        .asciz  "sg-vmm guest: mismatch in page 0x"
