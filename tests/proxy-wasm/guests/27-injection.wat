(on request_headers
  (call $say @value@ (call $add_header_map_value #0 @x-bad@ @a\0d\0ax-injected: 1@))
  (call $say @name@ (call $add_header_map_value #0 @x bad@ @a@))
  (call $say @replace@ (call $replace_header_map_value #0 @x-bad@ @a\0d\0ax-injected: 1@))
  (call $say @path@ (call $replace_header_map_value #0 @:path@ @/a HTTP/1.1\0d\0ax-injected: 1@))
  (if (call $path @/local@) (then
    (call $say @local@ (call $send_local_response #403 #0 #0 @no@ %x-bad=a\0d\0ax-injected: 1% #-1))))
  #0)
(on response_headers
  (call $say @value@ (call $add_header_map_value #2 @x-bad@ @a\0d\0ax-injected: 1@))
  (call $say @name@ (call $add_header_map_value #2 @x bad@ @a@))
  #0)
