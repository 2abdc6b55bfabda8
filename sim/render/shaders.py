"""The shaders of the OpenGL renderer (gl.py).

A fragment shader is the concatenation of COMMON (lens, light, shadows), of PATTERN (the albedo of a material) if it
paints a surface, and of its own text. KIND is the index in `surfaces.PATTERNS` of the pattern that the shader is
compiled for; 8, the next number, is the asset's own texture.
"""

COMMON = """
#version 330
#define NEAR 0.05
uniform vec3 eye;           // camera position
uniform vec4 lens;          // focal length and half width, half height, all in pixels of this target
uniform float top;          // first row of this frame in the target
uniform vec3 sun, sun_color, ambient;
uniform mat4 light;         // world to shadow map, all three in [0, 1]
uniform float frame, frames;
uniform float texel;        // of the shadow map, metres
uniform int occluders, own;
uniform vec4 spheres[16];
uniform sampler2DShadow shadow_map;

vec3 ray() {                // of length 1 along the optical axis
    vec2 p = (gl_FragCoord.xy - vec2(0, top) - lens.yz) / lens.x;
    return vec3(p.x, 1, -p.y);
}
float sunlit(vec3 p, vec3 n) {
    vec3 q = (light * vec4(p + n * texel * 1.5, 1)).xyz;
    bool outside = any(lessThan(q.xy, vec2(0))) || any(greaterThan(q.xy, vec2(1)));
    vec2 step = 0.75 / vec2(textureSize(shadow_map, 0)), at = vec2(q.x, (q.y + frame) / frames);
    float z = min(q.z, 1.0) - 0.001, sum = 0;
    for (int i = 0; i < 4; i++) sum += texture(shadow_map, vec3(at + step * vec2(i % 2 * 2 - 1, i / 2 * 2 - 1), z));
    return outside ? 1.0 : sum / 4;
}
float open_sky(vec3 p, vec3 n) {
    float open = 1;
    for (int i = 0; i < occluders; i++) {
        vec3 d = spheres[i].xyz - p;
        float square = max(dot(d, d), spheres[i].w * spheres[i].w);
        float hidden = max(dot(n, d), 0) * inversesqrt(square) * spheres[i].w * spheres[i].w / square;
        open *= i == own ? 1.0 : 1 - 0.8 * min(hidden, 1.0);
    }
    return open;
}
vec3 hemisphere(vec3 n) { return ambient * (0.75 + 0.25 * n.z); }
"""

PATTERN = """
uniform vec3 color, second;
uniform float scale;
uniform uint seed;

uint scramble(uint v) {     // one round of PCG
    v = v * 747796405u + 2891336453u;
    v = ((v >> ((v >> 28) + 4u)) ^ v) * 277803737u;
    return (v >> 22) ^ v;
}
float random(ivec3 cell) {
    uint v = scramble(uint(cell.x) + scramble(uint(cell.y) + scramble(uint(cell.z) + seed)));
    return float(v >> 8) / 16777216.0;
}
float noise(vec3 p) {       // value noise, one cell per unit
    ivec3 c = ivec3(floor(p));
    vec3 f = fract(p);
    f = f * f * (3 - 2 * f);
    vec4 low = vec4(random(c), random(c + ivec3(1, 0, 0)), random(c + ivec3(0, 1, 0)), random(c + ivec3(1, 1, 0)));
    c.z += 1;
    vec4 high = vec4(random(c), random(c + ivec3(1, 0, 0)), random(c + ivec3(0, 1, 0)), random(c + ivec3(1, 1, 0)));
    vec4 m = mix(low, high, f.z);
    return mix(mix(m.x, m.y, f.x), mix(m.z, m.w, f.x), f.y);
}
float clouds(vec3 p, float w) {  // octaves finer than the footprint w fade to their mean
    float sum = 0, gain = 0.5;
    for (int i = 0; i < 4; i++) {
        sum += gain * mix(noise(p), 0.5, smoothstep(0.4, 1.0, w));
        p = p * 2.03 + 17.0; w *= 2.03; gain *= 0.5;
    }
    return clamp(sum / 0.9375, 0, 1);
}
vec2 square_wave(vec2 p, vec2 w) {  // of period 2 and values +-1, averaged over a box of width w
    w = max(w, vec2(1e-4));
    return 2 * (abs(fract((p - 0.5 * w) * 0.5) - 0.5) - abs(fract((p + 0.5 * w) * 0.5) - 0.5)) / w;
}
float pulse(float p, float on, float w) {  // share of the box around p that lies in [0, on) of a period of 1
    vec2 e = vec2(p - 0.5 * w, p + 0.5 * w);
    vec2 i = floor(e) * on + min(fract(e), vec2(on));
    return (i.y - i.x) / w;
}
float flat_pattern(vec2 p, vec2 w) {
#if KIND == 2
    vec2 s = square_wave(p * 2, w * 2);
    return 0.5 - 0.5 * s.x * s.y;
#elif KIND == 3
    return 0.5 - 0.5 * square_wave(p * 2, w * 2).x;
#elif KIND == 4
    ivec3 cell = ivec3(floor(p), 7);
    vec2 shift = vec2(random(cell), random(cell + ivec3(0, 0, 1))) - 0.5;
    float radius = 0.18 + 0.16 * random(cell + ivec3(0, 0, 2)), edge = max(length(w) * 0.7, 0.01);
    float spot = 1 - smoothstep(radius - edge, radius + edge, length(fract(p) - 0.5 - shift * 0.3));
    return mix(spot, 0.21, smoothstep(0.5, 1.2, length(w)));
#else
    p *= vec2(1, 2); w = max(w * vec2(1, 2), vec2(1e-4));
    float row = floor(p.y);
    p.x += 0.5 * mod(row, 2.0);
    float brick = pulse(p.x, 0.94, w.x) * pulse(p.y, 0.9, w.y);
    float tone = mix(random(ivec3(floor(p.x), row, 3)), 0.5, smoothstep(0.3, 1.0, length(w)));
    return 1 - brick * (0.7 + 0.3 * tone);
#endif
}
vec3 paint(vec3 p, vec3 n) {  // the albedo at p (metres) on a surface with normal n
    p = p / scale + vec3(0.37, 0.61, 0.23);
    vec3 w = max(abs(dFdx(p)), abs(dFdy(p)));
    float size = length(w), t;
#if KIND == 0
    t = 0;
#elif KIND == 1
    t = smoothstep(0.25, 0.75, clouds(p * 2, size * 2));
#elif KIND == 6
    float bend = clouds(p, size) * 5;
    t = mix(0.5 + 0.5 * sin(6.2832 * (p.x + 0.4 * p.y + 0.7 * p.z + bend)), 0.5, smoothstep(0.1, 0.4, size));
    t = t * t;
#elif KIND == 7
    vec2 q = p.yz + 0.25 * (vec2(noise(p * 1.7), noise(p * 1.7 + 31.0)) - 0.5);
    float ring = length(q - vec2(0.2, -1.3)) * 6, fibre = noise(p * vec3(2, 45, 45));
    t = mix(0.5 + 0.5 * sin(6.2832 * ring * 0.5), 0.5, smoothstep(0.1, 0.35, size * 3));
    t = mix(t, fibre, 0.3 * (1 - smoothstep(0.01, 0.05, size)));
#else
    vec3 side = pow(abs(n), vec3(8));
    side /= side.x + side.y + side.z;
    t = side.x * flat_pattern(p.yz, w.yz) + side.y * flat_pattern(p.xz, w.xz) + side.z * flat_pattern(p.xy, w.xy);
#endif
    return mix(color, second, t);
}
"""

SCREEN_VERTEX = """
#version 330
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1, 0, 1); }
"""

PLATE = """
uniform vec3 normal;        // of the plane normal . x = offset
uniform float offset;
layout(location = 0) out vec4 shade;     // radiance without the sun, and depth
layout(location = 1) out vec4 sunshine;  // what the sun adds where no shadow falls
void main() {
    vec3 direction = ray();
    float towards = dot(direction, normal), depth = (offset - dot(eye, normal)) / towards;
    bool hit = towards < 0 && depth > NEAR;
    vec3 p = eye + direction * (hit ? depth : 0.0);
    float turn = random(ivec3(5)) * (normal.z > 0.5 ? 6.2832 : 0.0);
    if (normal.z < 0.5 && KIND == 3 && random(ivec3(6)) < 0.5) p = p.zyx;  // level stripes on half of the walls
    p.xy = normal.z < 0.5 ? p.xy : mat2(cos(turn), -sin(turn), sin(turn), cos(turn)) * p.xy;
    vec3 albedo = paint(p, normal);
    if (!hit) discard;
    shade = vec4(albedo * hemisphere(normal), depth);
    sunshine = vec4(albedo * sun_color * max(dot(normal, sun), 0), 0);
    gl_FragDepth = 1 - NEAR / depth;
}
"""

SKY = """
uniform vec3 horizon, zenith;
layout(location = 0) out vec4 shade;
layout(location = 1) out vec4 sunshine;
void main() {
    float height = normalize(ray()).z;
    shade = vec4(mix(horizon, zenith, smoothstep(0, 1, sqrt(max(height, 0)))), uintBitsToFloat(0x7f800000u));
    sunshine = vec4(0);
    gl_FragDepth = 1;
}
"""

BACKDROP = """
uniform sampler2D shade, sunshine;
uniform float wall_y;
out vec4 result;
void main() {
    ivec2 pixel = ivec2(gl_FragCoord.xy - vec2(0, top));
    vec4 still = texelFetch(shade, pixel, 0);
    vec3 p = eye + ray() * min(still.a, 1e4);
    vec3 n = p.y > wall_y - 1e-3 * still.a ? vec3(0, -1, 0) : vec3(0, 0, 1);
    result = vec4(still.rgb * open_sky(p, n) + texelFetch(sunshine, pixel, 0).rgb * sunlit(p, n), 1);
    gl_FragDepth = 1 - NEAR / still.a;
}
"""

BODY_VERTEX = """
#version 330
uniform mat4 to_world, to_camera;
uniform float size;
uniform vec4 lens;
in vec3 in_position, in_normal;
in vec2 in_uv;
out vec3 world, world_normal, local, local_normal;
out vec2 uv;
void main() {
    local = in_position * size;
    local_normal = in_normal;
    world = (to_world * vec4(local, 1)).xyz;
    world_normal = mat3(to_world) * in_normal;
    uv = in_uv;
    vec3 p = (to_camera * vec4(local, 1)).xyz;
    gl_Position = vec4(p.xy * lens.x / lens.yz, p.z - 2 * 0.05, p.z);
}
"""

BODY = """
in vec3 world, world_normal, local, local_normal;
in vec2 uv;
uniform sampler2D image;
out vec4 result;
void main() {
    vec3 view = normalize(eye - world), n = normalize(world_normal);
    n = dot(n, view) < 0 && !gl_FrontFacing ? -n : n;
#if KIND == 8
    vec3 albedo = texture(image, uv).rgb;
#else
    vec3 albedo = paint(local, normalize(local_normal));
#endif
    float lit = max(dot(n, sun), 0) * sunlit(world, n);
    float gloss = 0.15 * pow(max(dot(n, normalize(view + sun)), 0), 24);
    result = vec4(albedo * hemisphere(n) * open_sky(world, n) + (albedo + gloss) * lit * sun_color, 1);
}
"""

SHADOW_VERTEX = """
#version 330
uniform mat4 to_light;
in vec3 in_position;
void main() { gl_Position = vec4((to_light * vec4(in_position, 1)).xyz * 2 - 1, 1); }
"""

SHADOW = """
#version 330
void main() {}
"""

LABEL_VERTEX = """
#version 330
uniform mat4 to_camera, to_camera_next;
uniform float size;
uniform vec4 lens;
in vec3 in_position;
out vec3 here, next;
void main() {
    here = (to_camera * vec4(in_position * size, 1)).xyz;
    next = (to_camera_next * vec4(in_position * size, 1)).xyz;
    gl_Position = vec4(here.xy * lens.x / lens.yz, here.z - 2 * 0.05, here.z);
}
"""

LABEL = """
#version 330
in vec3 here, next;
uniform float instance;
uniform vec4 lens;
out vec4 label;             // instance, depth, flow
void main() { label = vec4(instance, here.z, (next.xy / next.z - here.xy / here.z) * lens.x); }
"""

LABEL_BACKDROP = """
uniform sampler2D shade;
out vec4 label;
void main() {
    float depth = texelFetch(shade, ivec2(gl_FragCoord.xy - vec2(0, top)), 0).a;
    label = vec4(0, depth, 0, 0);
    gl_FragDepth = 1 - NEAR / depth;
}
"""

RESOLVE = """
#version 330
uniform sampler2D fine;
uniform int samples;
out vec4 result;
void main() {
    ivec2 corner = ivec2(gl_FragCoord.xy) * samples;
    vec3 sum = vec3(0);
    for (int y = 0; y < samples; y++)
        for (int x = 0; x < samples; x++) sum += min(texelFetch(fine, corner + ivec2(x, y), 0).rgb, vec3(1));
    vec3 light = sum / float(samples * samples);
    vec3 curve = 1.055 * pow(light, vec3(1 / 2.4)) - 0.055;  // sRGB
    result = vec4(mix(light * 12.92, curve, greaterThan(light, vec3(0.0031308))), 1);
}
"""
