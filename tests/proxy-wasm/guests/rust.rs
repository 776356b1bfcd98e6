//! A filter in Rust, without the SDK: one file, built by tests/proxy-wasm/build.sh with its standard library for wasm32-wasip1.

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_log(level: u32, text: *const u8, size: usize) -> u32;
    fn proxy_get_header_map_value(map: u32, key: *const u8, n: usize, value: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_add_header_map_value(map: u32, key: *const u8, n: usize, value: *const u8, size: usize) -> u32;
    fn proxy_remove_header_map_value(map: u32, key: *const u8, n: usize) -> u32;
    fn proxy_set_buffer_bytes(buffer: u32, start: usize, length: usize, bytes: *const u8, size: usize) -> u32;
}

#[unsafe(no_mangle)]
extern "C" fn proxy_abi_version_0_2_1() {}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_memory_allocate(size: usize) -> *mut u8 {
    Box::leak(vec![0; size].into_boxed_slice()).as_mut_ptr()
}

fn add(map: u32) {
    let (key, value) = ("x-guest", "rust");
    unsafe { proxy_add_header_map_value(map, key.as_ptr(), key.len(), value.as_ptr(), value.len()) };
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_headers(_context: u32, _count: u32, _end: u32) -> u32 {
    let (mut value, mut size) = (std::ptr::null_mut(), 0);
    if unsafe { proxy_get_header_map_value(0, ":path".as_ptr(), 5, &raw mut value, &raw mut size) } == 0 && !value.is_null() {
        // The allocator above gave out this memory, and nobody else has it.
        let path = unsafe { Vec::from_raw_parts(value, size, size) };
        let line = format!("rust: {}", String::from_utf8_lossy(&path));
        unsafe { proxy_log(2, line.as_ptr(), line.len()) };
    }
    unsafe { proxy_remove_header_map_value(0, "content-length".as_ptr(), 14) };
    add(0);
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_request_body(_context: u32, _size: u32, end: u32) -> u32 {
    if end != 0 {
        unsafe { proxy_set_buffer_bytes(0, usize::MAX, 0, "<rust>".as_ptr(), 6) };
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn proxy_on_response_headers(_context: u32, _count: u32, _end: u32) -> u32 {
    add(2);
    0
}
